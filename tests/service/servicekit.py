"""A service as its users meet it: real HTTP, real SQLite, the unmodified openai client."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI

from cluster.local import free_ports
from cluster.ray_rest import RayRest
from service.api.app import create_app
from service.link import Link
from service.settings import Settings, make_home
from service.store import Store

DRIVER = Path(__file__).with_name("driver.py")
BASE = "smollm2-135m-instruct"


@contextmanager
def serving(app: Any) -> Iterator[int]:
    """Serve an ASGI app on a free port of loopback; the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def wait_for(condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"still waiting after {timeout_s} s")


def rows(**orders: Any) -> bytes:
    """A training file for the stand-in driver."""
    return json.dumps(orders).encode() + b"\n"


class Service:
    """An API over one home, and clients of it."""

    def __init__(self, settings: Settings, store: Store, link: Link) -> None:
        self.settings, self.store, self.link = settings, store, link
        self.base_url = ""
        self.clients: list[OpenAI] = []
        self._numbers = itertools.count()

    def key(self, project: str = "") -> str:
        """A key of this project; by default of one that nobody else has."""
        return self.store.create_key(project or f"p{next(self._numbers)}")

    def client(self, project: str = "", **options: Any) -> OpenAI:
        client = OpenAI(base_url=self.base_url, api_key=self.key(project), **{"max_retries": 0, **options})
        self.clients.append(client)
        return client


@contextmanager
def service_on(home: Path, link: Link | None = None, **settings: Any) -> Iterator[Service]:
    values = {"driver": str(DRIVER), "poll_s": 0.05, "backoff_s": 0.05, "chat_wait_s": 1.0, "models": home / "models"} | settings
    config = Settings(home=home, **values)
    make_home(config)
    store = Store(config.database_url)
    store.migrate()
    link = link or Link(RayRest(f"http://127.0.0.1:{free_ports(1)[0]}"), "127.0.0.1", free_ports(1)[0])
    service = Service(config, store, link)
    with serving(create_app(config, store, link)) as port:
        service.base_url = f"http://127.0.0.1:{port}/v1"
        yield service
        for client in service.clients:
            client.close()
    store.close()
