"""Adapters made by PEFT, and the serving app on a real Ray of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]


def make_adapter(model_dir: Path, folder: Path, seed: int, r: int = 4, targets: str | list[str] = "all-linear", **config: object) -> str:
    """A random PEFT adapter, strong enough to change what the tiny model says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    kind = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **config)  # type: ignore[arg-type]
    model = get_peft_model(base, kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three adapters of different ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(tiny, folder / "all", seed=1),
        make_adapter(tiny, folder / "attention", seed=2, r=2, targets=["q_proj", "v_proj"]),
        make_adapter(tiny, folder / "rslora", seed=3, r=8, use_rslora=True),
    ]


@dataclass(frozen=True)
class Served:
    url: str
    token: str
    adapters: list[str]


SERVER = """
    import sys
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions
    from serve.app import build

    temp, port, base, model_dir, token_file = sys.argv[1:]
    ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=temp, object_store_memory=100_000_000)
    ray_serve.start(http_options=HTTPOptions(port=int(port)))
    ray_serve.run(build({"name": base, "model_dir": model_dir, "token_file": token_file}), name=base, route_prefix="/" + base)
    print("ready", flush=True)
    sys.stdin.read()  # until the test session closes it
    ray_serve.shutdown()
    ray.shutdown()
"""


@pytest.fixture(scope="session")
def served(tiny: Path, adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """serve.app on Ray Serve, in a process of its own."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "token").write_text("serving-token")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    temp = tempfile.mkdtemp(prefix="ty", dir="/tmp")  # short: the paths of Ray's sockets may have 107 characters
    log = (folder / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVER), temp, str(port), "tiny", str(tiny), str(folder / "token")],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}/tiny"
        wait_for(url, process, Path(log.name))
        yield Served(url, "serving-token", adapters)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()
        shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture(scope="session")
def direct(tiny: Path, adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """serve.app over real HTTP, without Ray: what has nothing to do with Serve is tested on it, because it starts at once.

    Its model is the tiny one with four times the context: tools take room in an alphabet of bytes.
    """
    from serve.app import application
    from serve.chats import Chats
    from serve.transformers_engine import TransformersEngine

    model = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("direct") / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    with over_http(application(TransformersEngine(model), Chats(model), "tiny", "serving-token")) as url:
        yield Served(url, "serving-token", adapters)


@contextmanager
def over_http(app: Any) -> Iterator[str]:
    """Serve an ASGI app on a free port; its URL."""
    from tests.service.servicekit import serving

    with serving(app) as port:
        yield f"http://127.0.0.1:{port}"


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, wait_s: float = 240) -> None:
    started = time.monotonic()
    while time.monotonic() - started < wait_s and process.poll() is None:
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    pytest.fail(f"the serving app did not start:\n{log.read_text()[-3000:]}")
