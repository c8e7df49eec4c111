"""The raters' page in a real browser: real keys, real text, nothing that tells a model apart."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browserkit import Browser, chromium
from selenium.webdriver.common.keys import Keys
from servicekit import Service, service_on

from service.studies import SCALES

EVIL = '<img src=x onerror="document.title=\'broken in\'"><script>document.title="broken in"</script> & <b>bold</b>'


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service_on(tmp_path_factory.mktemp("home")) as service:
        yield service


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def study(service: Service, num: int = 4, kind: str = "pairwise", **more: Any) -> tuple[Any, dict[str, Any]]:
    """(the owner's client, the study): answers say whose they are, so that a test can tell what stands where."""
    client = service.client()
    rows = [
        {
            "messages": [{"role": "user", "content": f"Question {n} {EVIL}"}],
            "answers": {"tuned-x": f"good {n} {EVIL}", "base-x": f"bad {n}"},
        }
        for n in range(num)
    ]
    file = client.files.create(file=("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="evals").id
    body = {"file": file, "kind": kind, "name": "Which is better?", "instructions": f"Be strict. {EVIL}", **more}
    return client, client.post("/tuneyard/studies", cast_to=object, body=body)  # type: ignore[return-value]


def begin(browser: Browser, link: str, name: str) -> None:
    browser.open(link)
    browser.until("#start", "Your name")
    browser.press(name, Keys.ENTER)
    browser.until("#where", lambda text: name.strip().casefold() in text.casefold())


def results(client: Any, made: dict[str, Any]) -> dict[str, Any]:
    return client.get(f"/tuneyard/studies/{made['id']}/results", cast_to=object)


def test_keys_rate_and_the_page_goes_on(service: Service, browser: Browser) -> None:
    client, made = study(service)
    browser.open(made["link"])
    browser.until("#start", "4 questions, each with two answers")
    browser.open(study(service, 1)[1]["link"])
    browser.until("#start", "1 question, each with two answers")
    browser.open(made["link"])
    browser.until("#start", "4 questions")
    assert "Be strict. <img" in browser.text("#start .guide")
    begin(browser, made["link"], "Ann")
    seen = []
    for number in range(1, 5):
        browser.until("#where", f"{number} of 4")
        asked = re.match(r"user\nQuestion (\d)", browser.text("#conversation"))
        assert asked and EVIL in browser.text("#conversation"), browser.text("#conversation")
        left, right = browser.text("#pair section:nth-child(1)"), browser.text("#pair section:nth-child(2)")
        assert left.startswith("Answer A\n") and right.startswith("Answer B\n")
        seen.append(("good" in left, asked[1]))
        assert not re.search("tuned-x|base-x", browser.driver.page_source)  # blind
        browser.press("1" if "good" in left else Keys.ARROW_RIGHT)
    browser.until("#end", "All 4 are rated")
    assert {asked for _, asked in seen} == set("0123")
    assert browser.driver.title == "Which is better?" and browser.errors() == []
    told = results(client, made)
    assert told["wins"] == {"tuned-x": 4, "base-x": 0} and told["raters"] == {"Ann": 4}
    assert told["left_chosen"]["value"] == sum(left for left, _ in seen) / 4
    assert service.key() not in browser.driver.page_source and "ty-" not in browser.driver.page_source
    browser.find("#finish").click()
    assert "tuned-x 4 ×" in browser.until("#revealed", "tuned-x")
    browser.press(Keys.BACKSPACE)
    browser.open(made["link"])
    browser.until("#end", "Thank you")  # what was finished stays finished
    assert "tuned-x 4 ×" in browser.text("#revealed")


def test_back_changes_a_rating_and_a_reload_goes_on(service: Service, browser: Browser) -> None:
    client, made = study(service, 3)
    begin(browser, made["link"], "Bob")
    browser.press("3")
    browser.until("#where", "2 of 3")
    assert "1: Tie" in browser.text("#said")
    browser.press("x")
    browser.until("#where", "3 of 3")
    browser.press(Keys.BACKSPACE)
    browser.until("#where", "2 of 3 · 2 rated")
    assert browser.find("#choice-both_bad").get_attribute("aria-pressed") == "true"
    browser.press("u")
    browser.until("#where", "1 of 3")
    assert browser.find("#choice-tie").get_attribute("aria-pressed") == "true"
    assert not browser.find("#back").is_enabled()
    browser.press("4")  # instead of the tie
    browser.until("#where", "2 of 3 · 2 rated")
    browser.press(Keys.ENTER)  # as it is
    browser.until("#where", "3 of 3")
    browser.driver.refresh()
    browser.until("#where", "3 of 3 · 2 rated · Bob")  # no name is asked again
    browser.press(Keys.ENTER, "z")  # nothing of these rates,
    browser.press("1", holding=Keys.ALT)
    browser.press("1", holding=Keys.CONTROL)
    browser.find("#choice-tie").click()
    browser.until("#end", "All 3 are rated")
    browser.press(Keys.BACKSPACE)
    browser.until("#where", "3 of 3 · 3 rated")
    browser.press("3")
    browser.until("#end", "All 3 are rated")
    told = results(client, made)
    assert (told["ties"], told["both_bad"], told["ratings"]) == (1, 2, 3)


def test_a_second_rater_has_another_order_and_the_same_name_goes_on(service: Service, browser: Browser) -> None:
    client, made = study(service, 6)
    orders = []
    for name in ("Cleo", "Dan"):
        begin(browser, made["link"], name)
        order = []
        for number in range(1, 7):
            browser.until("#where", f"{number} of 6")
            order.append(browser.text("#conversation")[:17] + str("good" in browser.text("#pair section:nth-child(1)")))
            browser.press("1" if "good" in browser.text("#pair section:nth-child(1)") else "2")
        browser.until("#end", "All 6")
        browser.driver.execute_script("sessionStorage.clear()")
        orders.append(order)
    assert orders[0] != orders[1]  # equal by chance in 1 of 46,080
    told = results(client, made)
    assert told["agreement"]["same_choice"] == 1 and told["wins"]["tuned-x"] == 6
    begin(browser, made["link"], " cleo")
    browser.until("#end", "All 6 are rated")


def test_grades(service: Service, browser: Browser) -> None:
    client, made = study(service, 2, "likert")
    begin(browser, made["link"], "Eve")
    for number in range(1, 5):
        browser.until("#where", f"{number} of 4")
        good = "good" in browser.until("#pair", "Answer\n")
        browser.press(Keys.ENTER)  # not graded yet: nothing happens
        browser.press(*("5", "4", "3") if good else ("1", "2", "5"))
        if not good:
            browser.press(Keys.ARROW_UP, Keys.ARROW_UP, "2")  # a second thought on the first scale
            pressed = [b.text for b in browser.driver.find_elements("css selector", "#scales [aria-pressed=true]")]
            assert pressed == ["2", "2", "5"]
        browser.press(Keys.ENTER)
    browser.until("#end", "All 4 are rated")
    told = results(client, made)
    means = {model: [told["grades"][model][scale]["mean"] for scale in SCALES] for model in made["models"]}
    assert means == {"tuned-x": [5, 4, 3], "base-x": [2, 2, 5]}
    assert told["difference"]["helpfulness"]["mean"] == 3 and browser.errors() == []


def test_links_that_do_not_open(service: Service, browser: Browser) -> None:
    _, made = study(service, 1)
    page, _, token = made["link"].partition("#")
    browser.open(page)
    browser.until("#notice", "This link is not complete")
    browser.open(f"{page}#{token[:-1]}")
    browser.until("#notice", "does not open a study")


def test_nothing_sticks_out_of_a_narrow_window(service: Service, browser: Browser) -> None:
    """With TUNEYARD_PICTURES=FOLDER, what pages look like is kept there, wide and narrow, light and dark."""
    folder = os.environ.get("TUNEYARD_PICTURES")
    text = "A long answer that goes on and on, with a\nnew line, and a_very_long_word_" + "x" * 120
    client = service.client()
    rows = [{"prompt": "What is the capital of France?", "answers": {"a": "Paris. " * 30 + text, "b": "I do not know."}}] * 2
    file = client.files.create(file=("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="evals").id

    def look(name: str) -> None:
        for width, height in ((1280, 900), (390, 780)) if folder else ((390, 780),):
            browser.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
            assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width, name
            for scheme in ("light", "dark") if folder else ():
                browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
                browser.driver.save_screenshot(str(Path(str(folder), f"{name}-{width}-{scheme}.png")))

    for kind, keys in (("pairwise", ("2",)), ("likert", ("2", "5"))):
        made: Any = client.post("/tuneyard/studies", cast_to=object, body={"file": file, "kind": kind, "instructions": "Be strict."})
        browser.open(made["link"])
        browser.until("#start", "Your name")
        look(f"{kind}-start")
        browser.press("Ann", Keys.ENTER)
        browser.until("#where", "1 of")
        browser.press(*keys)
        if kind == "pairwise":
            browser.until("#where", "2 of 2")
        look(kind)
    browser.open(made["link"])
    browser.until("#where", "1 of 4")
    for number in range(1, 5):
        browser.until("#where", f"{number} of 4")
        browser.press("3", "4", "5", Keys.ENTER)
    browser.until("#end", "All 4")
    look("all-rated")
    browser.find("#finish").click()
    browser.until("#revealed", "honesty")
    look("revealed")
    browser.devtools("Emulation.clearDeviceMetricsOverride")
