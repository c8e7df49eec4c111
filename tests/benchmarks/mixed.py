"""Half an hour of everything at once: what comes back, and what memory does.

    python -m tests.benchmarks.mixed [--minutes 30] [--output RESULT.json]

Twelve clients, each asking one thing after the other: streams, streams that are left in the middle, whole answers, several answers, forms,
echoed prompts, prompts of thousands of tokens, slow readers, unknown models, wrong keys, prompts beyond the context, bodies of 10 MB,
numbers that are none. Anything but the status that belongs to a question, or a 503 that says when to come again, is a fault; the exit
status is 1 then, or where gateway or replica hold a tenth more memory in the last third than in the middle one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.benchmarks.serve import BASE, tuneyard
from trainers.catalogue import find
from trainers.fetch import default_models, ensure

CLIENTS = 12
FORM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


class Load:
    """The questions, and what came back."""

    def __init__(self, url: str, headers: dict[str, str], seed: int = 0) -> None:
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=300)
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.faults: list[str] = []
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[int]], set[int]]] = {
            # name: (weight, how it is asked, statuses that belong to it)
            "stream": (8, self.stream, {200}),
            "left": (6, self.left, {200}),
            "whole": (4, lambda: self.post(self.chat(max_tokens=24)), {200}),
            "several": (2, lambda: self.post(self.chat(max_tokens=12, n=4, temperature=1)), {200}),
            "form": (2, lambda: self.post(self.chat(max_tokens=40, response_format=self.form())), {200}),
            "logprobs": (2, lambda: self.post(self.chat(max_tokens=8, logprobs=True, top_logprobs=5)), {200}),
            "echo": (2, self.echo, {200}),
            "slow": (1, self.slow, {200}),
            "long": (1, self.long, {200}),
            "models": (2, self.models, {200}),
            "unknown": (2, lambda: self.post(self.chat(model="gpt-9")), {404}),
            "no_key": (1, self.no_key, {401}),
            "too_long": (2, lambda: self.post(self.chat(content="word " * 12_000)), {400}),
            "huge": (1, lambda: self.post(self.chat(content="x" * 10_000_000)), {400}),
            "nan": (1, lambda: self.raw(b'{"model": "%s", "messages": [], "temperature": NaN}' % BASE.encode()), {400}),
            "nobody": (1, lambda: self.post(self.chat() | {"messages": []}), {400}),
            "bad_form": (1, lambda: self.post(self.chat(response_format=self.form({"type": "nonsense"}))), {400}),
        }

    def chat(self, content: str = "", **fields: Any) -> dict[str, Any]:
        text = content or f"Tell me about the number {self.random.randrange(10_000)}."
        return {"model": BASE, "messages": [{"role": "user", "content": text}], "temperature": 0, **fields}

    @staticmethod
    def form(schema: dict[str, Any] = FORM) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}

    async def post(self, body: dict[str, Any], path: str = "/chat/completions") -> int:
        return self.told(await self.http.post(path, json=body))

    async def raw(self, content: bytes) -> int:
        return self.told(await self.http.post("/chat/completions", content=content, headers={"content-type": "application/json"}))

    def told(self, response: httpx.Response) -> int:
        if response.status_code >= 400 and not response.json()["error"]["message"]:
            self.faults.append(f"{response.status_code} without a message")
        return 0 if response.status_code == 503 and "retry-after" in response.headers else response.status_code

    async def stream(self, pause_s: float = 0.0, most: int = 10**6) -> int:
        """The whole of a stream, or its first pieces; a stream that just ends is a fault."""
        async with self.http.stream("POST", "/chat/completions", json=self.chat(max_tokens=48, stream=True)) as response:
            if response.status_code != 200:
                await response.aread()
                return self.told(response)
            number, line = 0, ""
            async for line in response.aiter_lines():
                number += bool(line)
                if '"error"' in line:
                    self.faults.append(f"stream: {line[:300]}")
                if number >= most:
                    return 200
                if line.startswith("data: [DONE]"):
                    return 200
                await asyncio.sleep(pause_s)
            self.faults.append(f"a stream ended with {line[:200]!r}")
            return 200

    async def left(self) -> int:
        return await self.stream(most=self.random.randrange(1, 20))

    async def slow(self) -> int:
        return await self.stream(pause_s=0.3)

    async def long(self) -> int:
        """A prompt of some thousand tokens, which no other begins like."""
        count = self.random.randrange(1_000, 7_000)
        return await self.post(self.chat(content=f"{self.random.random()} " + "word " * count, max_tokens=8))

    async def echo(self) -> int:
        return await self.post(
            {"model": BASE, "prompt": ["The sky is", "One two three"], "max_tokens": 0, "echo": True, "logprobs": 1}, "/completions"
        )

    async def models(self) -> int:
        return self.told(await self.http.get("/models"))

    async def no_key(self) -> int:
        return self.told(await self.http.post("/chat/completions", json=self.chat(), headers={"authorization": "Bearer nobody"}))

    async def client(self, until: float) -> None:
        names = list(self.kinds)
        weights = [self.kinds[name][0] for name in names]
        while time.monotonic() < until:
            [name] = self.random.choices(names, weights)
            _, ask, expected = self.kinds[name]
            try:
                status = await ask()
            except Exception as error:
                self.faults.append(f"{name}: {type(error).__name__}: {error}")
                continue
            self.seen[f"{name} {status or 'told to come again'}"] += 1
            if status and status not in expected:
                self.faults.append(f"{name}: {status}")


def processes(home: Path) -> dict[str, psutil.Process]:
    """The gateway and the replica."""
    gateway = psutil.Process(json.loads((home / "service.json").read_text())["pid"])
    marker = json.loads((home / "ray.json").read_text())["marker"]
    replicas = []
    for process in psutil.process_iter():
        try:
            if process.name().startswith("ray::ServeRepl") and process.environ().get("TUNEYARD_RAY") == marker:
                replicas.append(process)
        except psutil.Error:
            continue
    return {"gateway": gateway, "replica": replicas[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    ensure(find(BASE), default_models())
    with tempfile.TemporaryDirectory(prefix="ty", dir="/tmp") as folder, tuneyard(Path(folder)) as (url, headers):
        memory: dict[str, list[int]] = {"gateway": [], "replica": []}
        load = Load(url, headers)

        async def watch(until: float) -> None:
            found, began = processes(Path(folder)), time.monotonic()
            while time.monotonic() < until:
                for name, process in found.items():
                    memory[name].append(process.memory_info().rss)
                if len(memory["gateway"]) % 12 == 1:
                    sizes = ", ".join(f"{name} {values[-1] / 2**20:.0f} MB" for name, values in memory.items())
                    passed = (time.monotonic() - began) / 60
                    print(f"{passed:4.1f} min  {load.seen.total()} answers, {len(load.faults)} faults, {sizes}", flush=True)
                await asyncio.sleep(5)

        async def run() -> None:
            await load.stream()  # the model is loaded at the first request
            until = time.monotonic() + 60 * args.minutes
            await asyncio.gather(watch(until), *(load.client(until) for _ in range(CLIENTS)))
            await load.http.aclose()

        asyncio.run(run())
    third = max(1, len(memory["gateway"]) // 3)
    growth = {
        name: round(statistics.median(sizes[-third:]) / statistics.median(sizes[third : 2 * third] or sizes), 3)
        for name, sizes in memory.items()
    }
    result = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "model": BASE,
        "minutes": args.minutes,
        "clients": CLIENTS,
        "answers": dict(sorted(load.seen.items())),
        "faults": load.faults[:50],
        "num_faults": len(load.faults),
        "memory_mb": {name: [round(size / 2**20) for size in sizes[:: max(1, len(sizes) // 30)]] for name, sizes in memory.items()},
        "memory_last_third_over_middle": growth,
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(load.faults) or max(growth.values()) > 1.1)


if __name__ == "__main__":
    sys.exit(main())
