"""Debian's chromium, driven as a person would: real keys, real clicks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from servicekit import wait_for

LACKING = "no chromium with its driver here; install it with: apt-get install -y chromium chromium-driver"


class Browser:
    """One window."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get("about:blank")  # else another fragment of the same page would load nothing
        self.driver.get(url)

    def press(self, *keys: str, holding: str = "") -> None:
        for key in keys:
            chain = ActionChains(self.driver)
            (chain.key_down(holding).send_keys(key).key_up(holding) if holding else chain.send_keys(key)).perform()

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What can be read there; empty where nothing is shown."""
        return "\n".join(element.text for element in self.driver.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed())

    def until(self, selector: str, said: str | Callable[[str], bool]) -> str:
        """Wait until a part of the page says this; what it says."""
        test = said if callable(said) else lambda text: said in text
        seen = ""

        def there() -> bool:
            nonlocal seen
            seen = self.text(selector)
            return test(seen)

        try:
            wait_for(there, 300)
        except AssertionError:
            raise AssertionError(f"{selector} says {seen!r}; the page: {self.text('body')!r}; {self.errors()}") from None
        return seen

    def errors(self) -> list[str]:
        """What the browser complained of: broken scripts, and what the page's policy forbade."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def devtools(self, command: str, **values: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, values)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a new profile. Where there is none: skipped, but under CI=true failed."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and driver):
        pytest.fail(LACKING) if os.environ.get("CI") == "true" else pytest.skip(LACKING)
    options = Options()
    options.binary_location = browser
    for argument in (
        "headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "no-proxy-server", "window-size=1280,900", "lang=en-US",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")
        window = webdriver.Chrome(options, Service(driver))
        try:
            yield Browser(window)
        finally:
            window.quit()
