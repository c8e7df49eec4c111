"""One local head from start to stop: what it listens on, whom it answers, and that nothing of it stays."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import local
from cluster.ray_rest import RayRest
from trainers.errors import Unavailable


def test_a_head_from_start_to_stop(tmp_path: Path) -> None:
    head = local.start(tmp_path, num_cpus=1)
    try:
        assert (tmp_path / "ray.token").stat().st_mode & 0o777 == 0o600
        assert local.find(tmp_path) == head
        _listens_on_loopback_only(head)
        _answers_only_with_the_token(head)
        with head.client() as ray:
            _runs_jobs_once(ray, tmp_path)
            assert ray.applications() == {}
            ray.submit("sleeper", f"echo $PPID > {tmp_path / 'sleeping'}; exec sleep 600")
            wait(lambda: (tmp_path / "sleeping").exists())
        members = head.members()
        assert any("sleep 600" in " ".join(p.cmdline()) for p in members)
        next(p for p in members if p.name() == "raylet").kill()
        assert local.find(tmp_path) is None  # half a head is none, and is cleared away
        assert psutil.wait_procs(members, timeout=5)[1] == []
        assert not Path(head.temp_dir).exists() and not (tmp_path / "ray.json").exists()
    finally:
        local.stop(tmp_path)
    assert not local.stop(tmp_path)


def wait(condition: Callable[[], Any], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _listens_on_loopback_only(head: local.LocalHead) -> None:
    ours = {p.pid for p in head.members()}
    listening = {c.laddr.ip for c in psutil.net_connections("inet") if c.laddr and c.pid in ours and c.status == psutil.CONN_LISTEN}
    assert listening and all(ip.removeprefix("::ffff:") in ("127.0.0.1", "::1") for ip in listening)


def _answers_only_with_the_token(head: local.LocalHead) -> None:
    for token in (None, "wrong"):
        with RayRest(head.address, token) as stranger, pytest.raises(Unavailable, match="refuses our token"):
            stranger.submit("x", "true")


def _runs_jobs_once(ray: RayRest, folder: Path) -> None:
    assert ray.state("twice")[0] == "absent"
    for _ in range(2):
        ray.submit("twice", f"echo ran >> {folder / 'ran'}")
    wait(lambda: ray.state("twice")[0] == "ended")
    ray.submit("twice", f"echo ran >> {folder / 'ran'}")
    time.sleep(0.5)
    assert (folder / "ran").read_text() == "ran\n"
    ray.stop("twice")  # over, or never heard of: no error
    ray.stop("nobody")


def test_a_record_of_something_else_is_no_head(tmp_path: Path) -> None:
    assert local.find(tmp_path) is None
    (tmp_path / "ray.json").write_text("{")
    assert local.find(tmp_path) is None
    assert not local.stop(tmp_path)


def test_a_stale_record_stops_no_stranger(tmp_path: Path) -> None:
    """After a reboot the recorded session may belong to others: this very process, here."""
    import json
    import os

    record = {
        "address": "http://127.0.0.1:1", "gcs": "127.0.0.1:1", "serve_port": 1, "session": os.getsid(0),
        "temp_dir": str(tmp_path / "ty-gone"), "token_file": "", "marker": "not-ours",
    }  # fmt: skip
    (tmp_path / "ray.json").write_text(json.dumps(record))
    assert local.find(tmp_path) is None


def test_no_cluster_at_all() -> None:
    with RayRest("http://127.0.0.1:9") as ray, pytest.raises(Unavailable, match="does not answer"):
        ray.resources()
