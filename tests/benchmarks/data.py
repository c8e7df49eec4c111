"""The data plane's speed and memory, as ratios in one run.

    python -m tests.benchmarks.data [--data FILE ...] [--tokenizer FOLDER] [--megabytes 300] [--rows 1000000] [--output RESULT.json]

Measured on one core, in turns: the bare tokenizers library on the rendered texts; tokenize + mask + proof of the same conversations with
that library and with the fast tokenizer; the whole examination (parsing, fingerprints and tables too). Then a whole prepare on Ray Data
beside one in a plain loop; a million short rows and the memory they take; reading a step from the store; planning steps.
Without --data, rows of lengths like Alpaca's are made up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer

from trainers.batching import Order, plan
from trainers.catalogue import find
from trainers.chat import Chat
from trainers.examine import Rules, examine, no_garbage_collection
from trainers.fetch import default_models, ensure
from trainers.proof import Claim, prove_all
from trainers.sources import conversations, inspect
from trainers.spec import JobSpec, Source
from trainers.store import TokenStore
from trainers.tokens import one_core

WORDS = (  # common ones, about as long as in real text
    "people history world information family government health system computer meat year thanks music person reading method data food "
    "understanding theory law bird literature problem software control knowledge power ability economics love internet television science "
    "library nature fact product idea temperature investment area society activity story industry media thing oven community definition "
    "safety quality development language management player variety video week security country exam movie organization equipment physics "
    "analysis policy series thought basis boyfriend direction strategy technology army camera freedom paper environment child instance "
    "the a of to and in is that for it with as on by this you be are from or have an at not which can will one all more how what"
)


def made_up(path: Path, num_bytes: int, seed: int = 0) -> Path:
    """Rows of about Alpaca's lengths (a hundred characters of prompt, six hundred of answer), all different."""
    draw, words = random.Random(seed), WORDS.split()

    def text(mean: float) -> str:
        count = min(400, max(3, int(draw.lognormvariate(np.log(mean), 0.8))))
        return " ".join(draw.choices(words, k=count)).capitalize() + f", {draw.randrange(10**6)}."

    with path.open("w") as file:
        while file.tell() < num_bytes:
            file.writelines(json.dumps({"instruction": text(15), "input": "", "output": text(75)}) + "\n" for _ in range(200))
    return path


def median_rates(work: dict[str, Callable[[], Any]], megabytes: float, rounds: int) -> dict[str, float]:
    """MB/s of each piece of work, taking turns, so that a machine that slows down slows all; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: megabytes / statistics.median(taken) for name, taken in seconds.items()}


def on_one_core(model_dir: Path, files: list[Path], rounds: int) -> dict[str, Any]:
    """Tokenize + mask + proof beside the bare tokenizer; bytes are those of the rendered texts."""
    sources = [Source(path=str(path)) for path in files]
    rows = [row for source in sources for row in conversations(source)]
    chats = {backend: Chat.load(model_dir, backend=backend) for backend in ("hf", "fastokens")}  # type: ignore[arg-type]
    texts = [chats["hf"].render(row["messages"], tools=row["tools"]) for row in rows[:1]]
    texts = [str(text) for text in chats["hf"].render_all([(row["messages"], row["tools"], False) for row in rows])]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    bare = Tokenizer.from_str(chats["hf"].tokenizer_json)

    def make_and_prove(backend: str) -> None:
        for start in range(0, len(rows), 2048):
            batch = rows[start : start + 2048]
            with no_garbage_collection():  # as `examine` does
                made = chats[backend].examples(batch)
                claims = [Claim(row["id"], row, examples) for row, examples in zip(batch, made, strict=True) if isinstance(examples, list)]
                assert len(claims) == len(batch) and not any(prove_all(chats[backend], claims, "assistant"))

    def bare_tokenizer() -> None:
        for start in range(0, len(texts), 2048):
            bare.encode_batch_fast(texts[start : start + 2048], add_special_tokens=False)

    rules = Rules.of(JobSpec.parse({"data": {"train": [{"path": str(files[0])}]}}))

    def whole(backend: str) -> None:
        for source in sources:
            for chunk in inspect(source).chunks:
                for _ in examine(chats[backend], rules, chunk):
                    pass

    work = {
        "bare_hf": bare_tokenizer,
        "hf": lambda: make_and_prove("hf"),
        "fast": lambda: make_and_prove("fastokens"),
        "examine_fast": lambda: whole("fastokens"),
    }
    rates = median_rates(work, megabytes, rounds)
    return {
        "rows": len(rows),
        "megabytes_of_text": round(megabytes, 2),
        "bytes_per_row": round(megabytes * 1e6 / len(rows)),
        "bare_hf_mb_s": round(rates["bare_hf"], 2),
        "tokenize_mask_prove_hf_mb_s": round(rates["hf"], 2),
        "tokenize_mask_prove_fast_mb_s": round(rates["fast"], 2),
        "examine_fast_mb_s": round(rates["examine_fast"], 2),
        "hf_of_bare_hf": round(rates["hf"] / rates["bare_hf"], 3),
        "fast_of_hf": round(rates["fast"] / rates["hf"], 2),
    }


_PREPARE = """
import json, sys, time
from pathlib import Path
from trainers.prepare import prepare
from trainers.records import RunDir
from trainers.spec import JobSpec
from trainers.tokens import one_core
root, model, data, executor, cpus = sys.argv[1:]
one_core()
if executor == "ray":
    import ray
    ray.init("local", num_cpus=int(cpus), include_dashboard=False, log_to_driver=False, logging_level="error", _temp_dir=root + "/r")
    ray.data.from_items([1]).map_batches(lambda b: b).take_all()  # the first pipeline of a cluster starts its actors
spec = JobSpec.parse({"data": {"train": [{"path": data}]}})
start = time.perf_counter()
record = prepare(spec, Path(model), Path(root) / "stores", RunDir(Path(root) / "run", 1, "driver"), executor=executor)
print(json.dumps({"seconds": time.perf_counter() - start, "store": record.store}))
"""


class Memory:
    """The most heap (anonymous private memory) that a process and all below it took at once, leaving out what `skip` names."""

    def __init__(self, process: psutil.Popen, skip: Sequence[str] = ()) -> None:
        self.peak_bytes, self._process, self._skip = 0, process, skip
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in [self._process, *self._process.children(recursive=True)]:
                try:
                    if not any(name in " ".join(process.cmdline()[:2]) for name in self._skip):
                        total += sum(m.private_dirty for m in process.memory_maps() if not m.path.startswith("/"))
                except (psutil.Error, OSError):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(1)


def run_prepare(folder: Path, model_dir: Path, data: Path, executor: str, cpus: int, watch: bool = False) -> tuple[float, float, Path]:
    """(seconds, peak heap of driver and workers in MB, store) of a whole prepare in a process of its own; Ray's daemons are not counted.

    The heap is 0 unless one is to `watch` it, which itself takes a good part of a core.
    """
    folder.mkdir(parents=True)
    process = psutil.Popen(
        [sys.executable, "-c", _PREPARE, str(folder), str(model_dir), str(data), executor, str(cpus)], stdout=subprocess.PIPE, text=True
    )
    memory = Memory(process, skip=("gcs_server", "raylet", "dashboard", "monitor", "runtime_env")) if watch else None
    told = json.loads(process.communicate()[0].strip().splitlines()[-1])
    return told["seconds"], memory.peak_bytes / 1e6 if memory else 0.0, Path(told["store"])


def ray_beside_plain(model_dir: Path, data: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """A whole prepare on Ray Data with one CPU, beside the same in a plain loop."""
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    for number in range(rounds):
        for executor in seconds:
            taken, _, _ = run_prepare(scratch / f"{executor}{number}", model_dir, data, executor, 1)
            seconds[executor].append(taken)
    plain, on_ray = (statistics.median(seconds[executor]) for executor in ("local", "ray"))
    megabytes = data.stat().st_size / 1e6
    return {
        "megabytes": round(megabytes),
        "plain_s": round(plain, 2),
        "ray_s": round(on_ray, 2),
        "plain_mb_s": round(megabytes / plain, 2),
        "ray_of_plain": round(on_ray / plain, 3),
    }


def many_rows(model_dir: Path, num_rows: int, scratch: Path) -> dict[str, Any]:
    """Short rows on Ray with every CPU, and the heap of driver and workers."""
    data = scratch / "short.jsonl"
    with data.open("w") as file:
        for i in range(num_rows):
            asked, answer = f"What is {i} plus {i % 97}?", str(i + i % 97)
            file.write(f'{{"messages":[{{"role":"user","content":"{asked}"}},{{"role":"assistant","content":"{answer}"}}]}}\n')
    seconds, megabytes, store = run_prepare(scratch / "many", model_dir, data, "ray", os.cpu_count() or 1, watch=True)
    return {"rows": num_rows, "seconds": round(seconds, 1), "heap_mb": round(megabytes), **reading(store)}


def reading(store: Path, batch_size: int = 16) -> dict[str, Any]:
    """Reading the examples of one step."""
    train = TokenStore(store, "train")
    order = Order(train.key, len(train), 1, batch_size, 0)
    for i in order.step(0):
        train.get(int(i))
    steps = min(200, order.num_steps)
    permutation = order.permutation(0)
    start = time.perf_counter()
    for step in range(steps):
        for i in permutation[step * batch_size : (step + 1) * batch_size]:
            train.get(int(i))
    return {"read_step_ms": round((time.perf_counter() - start) / steps * 1000, 3)}


def planning(num_examples: int = 200_000, batch_size: int = 64, budget: int = 8192, ranks: int = 1) -> dict[str, Any]:
    """Speed, fill of the token budget and rank imbalance on lengths like Alpaca's."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(120), 0.75, num_examples), 16, 2048).astype(int)
    seconds, fills, imbalances = 0.0, [], []
    for start in range(0, num_examples, batch_size):
        step = lengths[start : start + batch_size].tolist()
        began = time.perf_counter()
        made = plan(step, ranks, budget)
        seconds += time.perf_counter() - began
        loads = [sum(step[i] for pack in rank for i in pack) for rank in made]
        packs = max(len(rank) for rank in made) * ranks
        fills.append((sum(step) / budget / ranks, packs / ranks))
        imbalances.append(max(loads) / (sum(loads) / ranks) - 1)
    # As few micro-batches as fit: what is left empty in the last one of a step is no waste, for no padding is computed.
    needed = sum(max(1, np.ceil(full)) for full, _ in fills)
    return {
        "ranks": ranks,
        "examples_per_s": round(num_examples / seconds),
        "microbatches_of_fewest": round(sum(packs for _, packs in fills) / needed, 4),
        "mean_imbalance": round(float(np.mean(imbalances)), 4),
        "p99_imbalance": round(float(np.quantile(imbalances, 0.99)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="*", help="files of conversations; by default rows are made up")
    parser.add_argument("--model", type=Path, nargs="*", help="folders with a tokenizer and a template; by default SmolLM2's")
    parser.add_argument("--megabytes", type=int, default=300, help="size of the data for Ray beside a plain loop")
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of short rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    one_core()
    models = args.model or [ensure(find("smollm2-135m-instruct"), default_models())]
    result: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version()}

    def tell(name: str, found: dict[str, Any]) -> None:
        result[name] = found
        print(name, json.dumps(found, indent=1), flush=True)

    with tempfile.TemporaryDirectory(prefix="ty") as scratch:
        folder = Path(scratch)
        files = args.data or [made_up(folder / "rows.jsonl", 8_000_000)]
        every_core = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(every_core)})
        for model_dir in models:
            tell(f"one_core_{model_dir.name}", on_one_core(model_dir, files, args.rounds))
        os.sched_setaffinity(0, every_core)
        if args.megabytes:
            tell(
                "ray_beside_plain",
                ray_beside_plain(models[0], made_up(folder / "large.jsonl", args.megabytes * 1_000_000), folder, args.rounds),
            )
        if args.rows:
            tell("many_rows", many_rows(models[0], args.rows, folder))
        for ranks in (1, 4):
            tell(f"planning_{ranks}_ranks", planning(ranks=ranks))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
