"""The local Ray head: started as a command, found again after a crash, stopped without touching any other Ray.

`ray stop` would stop every Ray on the machine. Instead each head gets a session of its own and a marker in the
environment that all its descendants inherit; what carries either is ours.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.ray_rest import RayRest
from trainers.errors import Unavailable

RECORD = "ray.json"
TOKEN = "ray.token"
MARKER = "TUNEYARD_RAY"
START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class LocalHead:
    """A head that was started; the content of `ray.json`."""

    address: str
    """Dashboard, for example http://127.0.0.1:40001."""
    gcs: str
    """Address that drivers on this machine join, host:port."""
    serve_port: int
    session: int
    """Process session of Ray's daemons."""
    temp_dir: str
    token_file: str
    marker: str

    def token(self) -> str:
        return Path(self.token_file).read_text(encoding="utf-8")

    def client(self) -> RayRest:
        return RayRest(self.address, self.token())

    def alive(self) -> bool:
        """Both daemons that nothing works without are there."""
        names = [" ".join(command) for command in _commands(self._in_session())]
        return all(any(daemon in name and self.temp_dir in name for name in names) for daemon in ("gcs_server", "raylet"))

    def stop(self) -> None:
        """End every process of this head, drivers and replicas included, and remove its temporary folder."""
        deadline = time.monotonic() + 1.5
        while members := self.members():
            for process in members:
                with suppress(psutil.NoSuchProcess):
                    # Terminated daemons take a while to say good-bye to each other; nothing of theirs needs saving.
                    process.terminate() if time.monotonic() < deadline else process.kill()
            psutil.wait_procs(members, timeout=1.0)
        shutil.rmtree(self.temp_dir, ignore_errors=True)

    def members(self) -> list[psutil.Process]:
        """Processes of this head: of its session, with its marker, or children of such."""
        ours = self._in_session()
        # After a reboot the number may be another's session; ours names our folder in some command line.
        if not any(self.temp_dir in " ".join(command) for command in _commands(ours)):
            ours = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARKER) == self.marker:
                    ours.append(process)
        members = {p.pid: p for p in ours}
        for process in ours:
            with suppress(psutil.Error):
                members.update({child.pid: child for child in process.children(recursive=True)})
        return list(members.values())

    def _in_session(self) -> list[psutil.Process]:
        found = []
        for pid in psutil.pids():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(pid) == self.session and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def find(home: Path) -> LocalHead | None:
    """The head that `home` started earlier, if it still lives; what is left of a half-dead one is stopped."""
    try:
        head = LocalHead(**json.loads((home / RECORD).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if head.alive():
        return head
    stop(home)
    return None


def stop(home: Path) -> bool:
    """Stop the head that `home` started; False when there was none."""
    record = home / RECORD
    try:
        head = LocalHead(**json.loads(record.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return False
    head.stop()
    record.unlink()
    return True


def start(home: Path, num_cpus: int | None = None, path: str = "") -> LocalHead:
    """Start a head with ports and folders of its own, on loopback only; takes about 7 s.

    `path` is put before PYTHONPATH of everything that runs there. Raises Unavailable with Ray's last words.
    """
    home.mkdir(parents=True, exist_ok=True)
    gcs, dashboard, agent, client, serve = free_ports(5)
    head = LocalHead(
        address=f"http://127.0.0.1:{dashboard}",
        gcs=f"127.0.0.1:{gcs}",
        serve_port=serve,
        session=0,
        temp_dir=tempfile.mkdtemp(prefix="ty-", dir="/tmp"),  # Unix socket paths end at 107 characters
        token_file=str(_token_file(home)),
        marker=secrets.token_hex(8),
    )
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]  # else Ray claims 10002 to 19999
    command += [f"--temp-dir={head.temp_dir}", f"--num-cpus={num_cpus or os.cpu_count()}", "--disable-usage-stats"]
    command += [f"--object-store-memory={_object_store_bytes()}"]
    log = Path(head.temp_dir) / "start.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=_environment(head, path), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    head = LocalHead(**{**asdict(head), "session": process.pid})
    (home / RECORD).write_text(json.dumps(asdict(head), indent=2), encoding="utf-8")  # at once: a kill from here on can be cleaned up
    try:
        code = process.wait(START_TIMEOUT_S)
        ready = code == 0 and _answers(head)
    except subprocess.TimeoutExpired:
        ready = False
    except BaseException:  # Ctrl-C while waiting
        stop(home)
        raise
    if not ready:
        words = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        stop(home)
        raise Unavailable(
            f"A local Ray head did not start: {(words or ['it said nothing'])[-1]}",
            "Free some memory or ports, then run `tuneyard up` again.",
        )
    return head


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _environment(head: LocalHead, path: str) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return keep | {
        MARKER: head.marker,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": head.token_file,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(int(START_TIMEOUT_S)),  # by default 60 s, too few on a machine that is busy
        # Without it Ray turns 127.0.0.1 into the machine's outer address and its daemons listen everywhere.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Threads that wait for each other spin briefly, then sleep: see trainers/local.py.
        "GOMP_SPINCOUNT": "20000",
        # The gateway asks replicas themselves: through Serve's proxy every token of an answer becomes an object of Ray's.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # the gateway notices within a second or two that a replica goes
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # what takes long there has threads of its own
        "RAY_worker_niceness": "0",  # by default Ray's own daemons, and everything else, go before the training they are there for
        "PYTHONPATH": os.pathsep.join(p for p in (path, os.environ.get("PYTHONPATH", "")) if p),
    }


def _answers(head: LocalHead) -> bool:
    """Wait until the dashboard answers questions about jobs."""
    deadline = time.monotonic() + START_TIMEOUT_S
    with head.client() as ray:
        while time.monotonic() < deadline:
            with suppress(Unavailable):
                ray.state("none")
                return True
            time.sleep(0.1)
    return False


def _token_file(home: Path) -> Path:
    """The cluster's own token, made once, readable by its owner only."""
    file = home / TOKEN
    if not file.exists():
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as output:
            output.write(secrets.token_hex(32))
    return file


def _object_store_bytes() -> int:
    """Room for Ray Data's blocks: modest, since token stores are files, and within shared memory (else Ray falls back to disk)."""
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 2**31
    return max(100 * 2**20, min(2**31, psutil.virtual_memory().total // 8, int(shared * 0.8)))


def _commands(processes: list[psutil.Process]) -> list[list[str]]:
    found = []
    for process in processes:
        with suppress(psutil.Error):
            found.append(process.cmdline())
    return found
