"""`tuneyard up`: the foreground process that holds the service together. API, runner and, unless told otherwise, a local Ray.

Killed with -9 it leaves Ray and the jobs running; started again it finds them. Ctrl-C and SIGTERM stop all that it started.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn

import trainers
from cluster import local
from cluster.ray_rest import RayRest
from service.api.app import create_app
from service.link import Link
from service.runner import Runner
from service.settings import Settings, make_home, write_secret
from service.store import Store
from trainers.catalogue import find
from trainers.errors import TuneyardError, Unavailable, UserError
from trainers.fetch import ensure
from trainers.records import write_atomic
from trainers.spec import ModelPart

log = logging.getLogger("tuneyard.up")

Say = Callable[[str], None]

SERVICE = "service.json"  # where the running service of a home answers
LOCK = "lock"  # held by the process that runs on a home; its content is that process's id
WATCH_S = 3.0
FIRST_PROJECT = "default"


def up(settings: Settings, say: Say) -> None:
    """Run the service until it is told to stop. Raises TuneyardError when it cannot start."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # so that every way to stop us is a KeyboardInterrupt
    make_home(settings)
    with _only_one(settings.home), _listen(settings) as listener:
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        _log_to(settings.home / "service.log")
        store = Store(settings.database_url)
        store.migrate()
        key = _first_key(settings, store)
        link = _connect(settings, say)
        stop = threading.Event()
        runner = Runner(settings, store, link)
        threads = [threading.Thread(target=runner.run, args=(stop,), name="runner")]
        if settings.ray_address is None:
            threads.append(threading.Thread(target=_keep_alive, args=(stop, settings, link, say), name="ray"))

        def ready() -> None:
            for thread in threads:
                thread.start()
            write_atomic(settings.home / SERVICE, json.dumps({"base_url": settings.base_url, "pid": os.getpid()}))
            _greet(settings, key, say)

        try:
            _fetch_default_base(settings, say)
            app = create_app(settings, store, link)
            config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=3)
            _Server(config, ready).run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave half of it running
            say("Stopping.")
            stop.set()
            link.changed.set()
            for thread in threads:
                if thread.is_alive():
                    thread.join()
            try:
                if settings.ray_address is None:
                    runner.pause()
            finally:
                if settings.ray_address is None:
                    local.stop(settings.home)
                (settings.home / SERVICE).unlink(missing_ok=True)
                store.close()


def down(settings: Settings) -> bool:
    """Stop the service of this home, or the Ray that a killed one left; False when there was nothing to stop."""
    if not settings.home.is_dir():
        return False
    stopped = _stop_service(settings.home)
    with _only_one(settings.home):
        if (head := local.find(settings.home)) is None:
            return stopped
        make_home(settings)
        store = Store(settings.database_url)
        store.migrate()
        with head.client() as ray:
            Runner(settings, store, Link(ray, "127.0.0.1", head.serve_port)).pause()
        store.close()
        return local.stop(settings.home)


class _Server(uvicorn.Server):
    """uvicorn that says when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Hold the home: two services on one would fight over its Ray."""
    with (home / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"Another `tuneyard up` (process {file.read().strip() or 'unknown'}) runs on {home}.",
                "Use that one, stop it with `tuneyard down`, or choose another --home.",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _listen(settings: Settings) -> Iterator[socket.socket]:
    """The API's socket, taken before anything slow is started."""
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            what = error.strerror or "cannot be used"
            raise UserError(f"Port {settings.port} on {settings.host}: {what}.", "Stop what uses it, or choose another --port.") from None
        yield listener


def _log_to(file: Path) -> None:
    logging.basicConfig(filename=file, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request to Ray would drown the rest
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _first_key(settings: Settings, store: Store) -> str | None:
    """The first key, if it had to be made now."""
    with suppress(FileNotFoundError):
        if store.project_of(settings.key_file.read_text(encoding="utf-8")) is not None:
            return None
    key = store.create_key(FIRST_PROJECT)
    write_secret(settings.key_file, key)
    return key


def _connect(settings: Settings, say: Say) -> Link:
    if settings.ray_address is not None:
        ray = RayRest(settings.ray_address, settings.ray_token)
        ray.state("none")  # refuse now rather than leave every job waiting
        say(f"Using the Ray cluster at {settings.ray_address}.")
        return Link(ray, "127.0.0.1", settings.serve_port)
    head = local.find(settings.home)
    if head is not None:
        say("Found the local Ray of an earlier run; its jobs go on.")
    else:
        say("Starting a local Ray (about 10 s).")
        head = local.start(settings.home, path=_code())
    return Link(head.client(), "127.0.0.1", head.serve_port)


def _keep_alive(stop: threading.Event, settings: Settings, link: Link, say: Say) -> None:
    """Start the local Ray again when it has died; the runner then sees that its attempts are gone."""
    while not stop.wait(WATCH_S):
        try:
            head = local.find(settings.home)
            if head is None:
                say("The local Ray is gone; starting it again.")
                head = local.start(settings.home, path=_code())
                link.ray, link.serve_port = head.client(), head.serve_port
        except Unavailable as error:
            say(str(error))
        except Exception:
            log.exception("Looking after the local Ray failed; trying again.")


def _fetch_default_base(settings: Settings, say: Say) -> None:
    """Have the default base model ready before the first job asks. Without it the service still serves other bases."""
    try:
        ensure(find(ModelPart().base), settings.models, say=say)
    except TuneyardError as error:
        say(f"Warning: {error}")


def _greet(settings: Settings, key: str | None, say: Say) -> None:
    say(f"Tuneyard answers at {settings.base_url}")
    say(f"Key: {key} (shown once; kept in {settings.key_file})" if key else f"Key: in {settings.key_file}")
    say("")
    say(f"export OPENAI_BASE_URL={settings.base_url}")
    say(f"export OPENAI_API_KEY={key or f'$(cat {settings.key_file})'}")
    say("")
    say("Ctrl-C stops everything; jobs go on at the next start.")


def _code() -> str:
    """Folder that our packages are imported from, so that what runs on Ray finds the same ones."""
    return str(Path(trainers.__path__[0]).parent)


def _stop_service(home: Path) -> bool:
    """Ask the process that holds the home to stop, and wait until it has; False when there is none."""
    try:
        with _only_one(home):
            return False
    except UserError:
        pid = int((home / LOCK).read_text(encoding="utf-8"))
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(UserError), _only_one(home):
            return True
        time.sleep(0.2)
    raise Unavailable(
        f"The service of {home} (process {pid}) does not stop.", f"Kill it with `kill -9 {pid}`, then run `tuneyard down` again."
    )
