"""The speed of answering, as ratios in one run.

    python -m tests.benchmarks.serve [--only chats adapters service finished] [--rounds 5] [--output RESULT.json]

`chats`: 32 chats at a time in our engine beside transformers' static `generate` of the same 32 prompts, in turns, as many new tokens.
`adapters`: 32 chats on one adapter beside the same over 20, in turns; memory of a process with one beside that of one with 20.
`service`: time to the first token of one stream, and tokens/s of 16 streams, through gateway and Ray Serve beside the engine alone, in
turns; the latency of a request that does nothing, with 32 clients.
`finished`: the first answer (16 tokens) of a LoRA job, asked as soon as it says that it succeeded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch is loaded, as the service's replicas have it

import aiohttp
import httpx
import psutil
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from serve.adapters import PATIENCE_STEPS
from serve.engine import GenerateRequest, TokenEvent
from serve.transformers_engine import TransformersEngine
from trainers.catalogue import find
from trainers.chat import Chat
from trainers.fetch import default_models, ensure

BASE = "smollm2-135m-instruct"
TOKENS = 64
SUBJECTS = ["fox", "river", "engine", "winter", "letter", "market", "violin", "garden", "bridge", "island"]


class Prompts:
    """Short chats, never the same twice, so that nothing but the system prompt was read before."""

    def __init__(self, model_dir: Path) -> None:
        self._chat = Chat.load(model_dir)
        self._number = 0

    def take(self, count: int) -> list[list[int]]:
        return [self._chat.prompt([{"role": "user", "content": text}]) for text in self.texts(count)]

    def texts(self, count: int) -> list[str]:
        first, self._number = self._number, self._number + count
        return [f"{n}. Tell me a story about a {SUBJECTS[n % 10]} and the number {n * 7919 % 9973}." for n in range(first, first + count)]


def in_turns(work: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each piece of work once a round, so that a machine that slows down slows all; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            value = run()
            if number:
                found[name].append(value)
    return found


async def answer(engine: TransformersEngine, request: GenerateRequest) -> tuple[int, float]:
    """(tokens, seconds to the first)."""
    start, first, count = time.perf_counter(), 0.0, 0
    async for event in engine.generate(request):
        assert isinstance(event, TokenEvent)
        first = first or time.perf_counter() - start
        count += 1
    return count, first


def speed(engine: TransformersEngine, prompts: list[list[int]], adapters: list[str] | None = None) -> tuple[float, float]:
    """Tokens/s of all prompts at a time, and the median time to a first token."""

    async def main() -> list[tuple[int, float]]:
        requests = [
            GenerateRequest(
                prompt_ids=ids,
                adapter=adapters[i % len(adapters)] if adapters else None,
                temperature=0.0,
                max_tokens=TOKENS,
                stop_ids=frozenset(),
            )
            for i, ids in enumerate(prompts)
        ]
        return await asyncio.gather(*(answer(engine, r) for r in requests))

    start = time.perf_counter()
    done = asyncio.run(main())
    return sum(n for n, _ in done) / (time.perf_counter() - start), statistics.median(s for _, s in done)


def chats(model_dir: Path, rounds: int) -> dict[str, Any]:
    prompts, engine = Prompts(model_dir), TransformersEngine(model_dir)
    reference: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    firsts: list[float] = []

    def ours() -> float:
        rate, first = speed(engine, prompts.take(32))
        firsts.append(first)
        return rate

    def static() -> float:
        rows = prompts.take(32)
        width = max(map(len, rows))
        ids = torch.tensor([[2] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        start = time.perf_counter()
        reference.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=2
        )
        return 32 * TOKENS / (time.perf_counter() - start)

    rates = in_turns({"engine": ours, "static_generate": static}, rounds)
    engine.close()
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    return {
        "tokens_per_s": medians,
        "all_rounds": {name: [round(v, 1) for v in values] for name, values in rates.items()},
        "ratio": round(statistics.median(a / b for a, b in zip(*rates.values(), strict=True)), 3),
        "first_token_s": round(statistics.median(firsts[1:]), 3),
    }


# -- adapters ----------------------------------------------------------------------------------------------------------


def make_adapters(model_dir: Path, folder: Path, count: int, rank: int = 16) -> list[str]:
    """Random LoRA adapters of all linear layers, in PEFT's layout."""
    config = AutoConfig.from_pretrained(model_dir)
    width, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = {
        **{f"self_attn.{name}": (rows, width) for name, rows in (("q_proj", width), ("k_proj", kv), ("v_proj", kv), ("o_proj", width))},
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    paths = []
    for number in range(count):
        path = folder / str(number)
        path.mkdir()
        torch.manual_seed(number)
        tensors = {}
        for layer in range(config.num_hidden_layers):
            for name, (rows, columns) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns) * 0.02
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
        save_file({key: t.bfloat16() for key, t in tensors.items()}, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
        paths.append(str(path))
    return paths


def adapters(model_dir: Path, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ty") as scratch:
        paths = make_adapters(model_dir, Path(scratch), 20)
        memory = {}
        for count in (1, 20):
            command = [sys.executable, "-m", "tests.benchmarks.serve", "--memory-of", str(model_dir), *paths[:count]]
            memory[f"adapters_{count}"] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        prompts, engine = Prompts(model_dir), TransformersEngine(model_dir)

        def one() -> float:
            speed(engine, prompts.take(1), paths[:1])  # PATIENCE_STEPS later no other adapter is mixed in
            return speed(engine, prompts.take(32), paths[:1])[0]

        def twenty() -> float:
            return speed(engine, prompts.take(32), paths)[0]

        assert TOKENS > PATIENCE_STEPS
        rates = in_turns({"adapters_1": one, "adapters_20": twenty, "base": lambda: speed(engine, prompts.take(32))[0]}, rounds)
        engine.close()
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    return {
        "rank": 16,
        "tokens_per_s": medians,
        "throughput_ratio": round(statistics.median(b / a for a, b in zip(rates["adapters_1"], rates["adapters_20"], strict=True)), 3),
        "peak_bytes": memory,
        "memory_ratio": round(memory["adapters_20"] / memory["adapters_1"], 3),
    }


def memory_of(model_dir: Path, paths: list[str]) -> None:
    """Print the most memory that this process takes while it answers 32 chats with these adapters."""
    engine, most, done = TransformersEngine(model_dir), [0], threading.Event()

    def watch() -> None:
        process = psutil.Process()
        while not done.wait(0.05):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    prompts = Prompts(model_dir)
    for _ in range(2):
        speed(engine, prompts.take(32), paths)
    done.set()
    watcher.join()
    engine.close()
    print(most[0])


# -- gateway and Ray Serve ---------------------------------------------------------------------------------------------


@contextmanager
def tuneyard(home: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A service of its own: (base_url, headers)."""
    command = [sys.executable, "-m", "service.cli", "up", "--home", str(home), "--port", "0"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ready = home / "service.json"
            deadline = time.monotonic() + 180
            while not ready.exists():
                assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()[-2000:]
                time.sleep(0.2)
            yield json.loads(ready.read_text())["base_url"], {"authorization": f"Bearer {(home / 'key').read_text()}"}
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(120)


async def streamed(client: httpx.AsyncClient, text: str, max_tokens: int) -> tuple[int, float]:
    """(tokens, seconds to the first) of one chat over HTTP."""
    body = {
        "model": BASE,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if not first and event["choices"] and event["choices"][0]["delta"].get("content"):
                    first = time.perf_counter() - start
                if usage := event.get("usage"):
                    count = usage["completion_tokens"]
    assert response.status_code == 200 and count
    return count, first


def service(model_dir: Path, rounds: int) -> dict[str, Any]:
    prompts, engine = Prompts(model_dir), TransformersEngine(model_dir)
    chat = Chat.load(model_dir)

    async def direct(text: str, max_tokens: int) -> tuple[int, float]:
        start = time.perf_counter()
        ids = chat.prompt([{"role": "user", "content": text}])
        prepared = time.perf_counter() - start
        count, first = await answer(engine, GenerateRequest(prompt_ids=ids, temperature=0.0, max_tokens=max_tokens))
        return count, prepared + first

    with tempfile.TemporaryDirectory(prefix="ty", dir="/tmp") as home, tuneyard(Path(home)) as (url, headers):
        runner = asyncio.Runner()
        client = httpx.AsyncClient(base_url=url, headers=headers, timeout=600)

        async def crowd(ask: Callable[[str, int], Any]) -> float:
            start = time.perf_counter()
            done = await asyncio.gather(*(ask(text, TOKENS) for text in prompts.texts(16)))
            return sum(n for n, _ in done) / (time.perf_counter() - start)

        def through(text: str, max_tokens: int) -> Any:
            return streamed(client, text, max_tokens)

        runner.run(through("Hello", 2))  # the model is loaded at the first request
        firsts = in_turns(
            {
                "engine": lambda: runner.run(direct(prompts.texts(1)[0], 2))[1],
                "service": lambda: runner.run(through(prompts.texts(1)[0], 2))[1],
            },
            rounds * 12,
        )
        rates = in_turns({"engine": lambda: runner.run(crowd(direct)), "service": lambda: runner.run(crowd(through))}, rounds)

        async def nothing() -> list[float]:
            """32 clients, each asking again as soon as it is answered, for five seconds. Not with httpx, whose pool takes longer over 32
            connections than the service does."""
            taken: list[float] = []
            async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:

                async def one(until: float) -> None:
                    while (start := time.perf_counter()) < until:
                        async with session.get(f"{url}/models") as response:
                            response.raise_for_status()
                            await response.read()
                        taken.append(time.perf_counter() - start)

                for seconds in (1, 5):  # first, all connect
                    taken.clear()
                    until = time.perf_counter() + seconds
                    await asyncio.gather(*(one(until) for _ in range(32)))
            return taken

        taken = runner.run(nothing())
        runner.run(client.aclose())
        runner.close()
    engine.close()
    medians = {name: statistics.median(values) for name, values in firsts.items()}
    return {
        "first_token_ms": {name: round(1000 * value, 2) for name, value in medians.items()},
        "added_to_first_token_ms": round(1000 * (medians["service"] - medians["engine"]), 2),
        "tokens_per_s_at_16_streams": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "throughput_ratio": round(statistics.median(b / a for a, b in zip(*rates.values(), strict=True)), 3),
        "no_op_per_s": round(len(taken) / 5),
        "no_op_ms": {"p50": round(1000 * statistics.median(taken), 1), "p99": round(1000 * sorted(taken)[int(len(taken) * 0.99)], 1)},
    }


def finished(model_dir: Path, rounds: int) -> dict[str, Any]:
    """How long the first answer of a LoRA job takes that has just succeeded, its base being loaded."""
    taken = []
    with tempfile.TemporaryDirectory(prefix="ty", dir="/tmp") as home, tuneyard(Path(home)) as (url, headers):
        rows = [{"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}]} for n in range(16)]
        with httpx.Client(base_url=url, headers=headers, timeout=600) as client:
            content = "".join(json.dumps(row) + "\n" for row in rows)
            file = client.post("/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "fine-tune"}).json()["id"]
            for number in range(rounds):
                job = {"optim": {"epochs": 1, "batch_size": 8, "seed": number}}
                body = {"model": BASE, "training_file": file, "job": job}
                made = client.post("/fine_tuning/jobs", json=body).raise_for_status().json()
                while (made := client.get(f"/fine_tuning/jobs/{made['id']}").json())["status"] not in ("succeeded", "failed"):
                    time.sleep(0.05)
                assert made["status"] == "succeeded", made
                start = time.perf_counter()
                asked = {"model": made["fine_tuned_model"], "messages": rows[0]["messages"][:1], "max_tokens": 16}
                client.post("/chat/completions", json=asked).raise_for_status()
                taken.append(time.perf_counter() - start)
    return {"first_answer_s": round(statistics.median(taken), 3), "all_s": [round(seconds, 3) for seconds in taken]}


PARTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {"chats": chats, "adapters": adapters, "service": service, "finished": finished}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="parts that are not run keep what the file says of them")
    parser.add_argument("--memory-of", nargs="+", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if args.memory_of:
        return memory_of(Path(args.memory_of[0]), args.memory_of[1:])
    model_dir = ensure(find(BASE), default_models())
    output: Path | None = args.output
    result: dict[str, Any] = json.loads(output.read_text()) if output and output.exists() else {}
    result |= {"machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores", "model": BASE, "torch": torch.__version__}
    for name in args.only:
        result[name] = PARTS[name](model_dir, args.rounds) | {"load_at_end": round(os.getloadavg()[0], 1)}
        print(name, json.dumps(result[name], indent=1), flush=True)
        if output:
            output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
