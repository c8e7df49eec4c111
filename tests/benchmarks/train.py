"""Training speed: our loop beside a plain transformers + PEFT loop on the same steps, in one run.

    python -m tests.benchmarks.train [--data FILE ...] [--rounds 3] [--output RESULT.json]

Both train a LoRA r16 on all linear layers of SmolLM2-135M in bf16, with the same examples in the same steps. They take turns, step by
step, so that a machine that slows down slows both; the ratio is the median over the turns. The machine's bf16 matmul rate, measured in the
same run, says how much of it the loop uses: FLOPs are those the method needs (forward and input gradients of the body, nothing for
padding), not those spent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch is loaded; see trainers/local.py

import torch

from trainers import lora, model, optim, resolve
from trainers.batching import Order
from trainers.catalogue import find
from trainers.fetch import default_models, ensure
from trainers.parallel import World
from trainers.prepare import prepare
from trainers.records import RunDir
from trainers.spec import JobSpec, Placement
from trainers.store import TokenStore
from trainers.train import train_step

ROOT = Path(__file__).parents[2]
Step = Callable[[int], None]


def matmul_rate(size: int = 2048, repeats: int = 20) -> float:
    """bf16 FLOP/s of one large matrix product, the best of three rounds."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        rates.append(2 * size**3 * repeats / (time.perf_counter() - start))
    return max(rates)


def ours(spec: JobSpec, model_dir: Path, store: TokenStore, order: Order) -> tuple[Step, model.Trainee]:
    trainee = model.Trainee(lora.apply(model.load(model_dir, torch.bfloat16), spec.method, 0))
    parameters = lora.trainable(trainee.model)
    optimizer = optim.build(parameters, spec.optim)

    def step(number: int) -> None:
        train_step(trainee, parameters, optimizer, store, order.step(number), 1e-4, spec, World(), lambda: False, [])

    return step, trainee


def plain(spec: JobSpec, model_dir: Path, store: TokenStore, order: Order) -> Step:
    """What one writes first: PEFT on a padded batch, labels, the model's own loss."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=spec.method.r, lora_alpha=int(spec.method.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    peer = get_peft_model(model.load(model_dir, torch.bfloat16, attn="sdpa"), config).train()
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4)

    def step(number: int) -> None:
        examples = [store.get(int(i)) for i in order.step(number)]
        longest = max(len(ids) for ids, _ in examples)
        ids_BL = torch.zeros(len(examples), longest, dtype=torch.long)
        labels_BL, mask_BL = torch.full_like(ids_BL, -100), torch.zeros_like(ids_BL)
        for row, (ids, weights) in enumerate(examples):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            labels_BL[row, : len(ids)][torch.tensor(weights) > 0] = ids_BL[row, : len(ids)][torch.tensor(weights) > 0]
            mask_BL[row, : len(ids)] = 1
        peer(input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops_per_token(trainee: model.Trainee) -> int:
    """Forward and input gradient of every linear layer of the body: 4 FLOPs per weight; the frozen weights need no gradient."""
    return 4 * sum(m.base.weight.numel() for m in trainee.modules() if isinstance(m, lora.LoraLinear))


def timed(step: Step, number: int) -> float:
    start = time.perf_counter()
    step(number)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "examples/task_api/train.jsonl")], help="training files in any format")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()

    base = find("smollm2-135m-instruct")
    model_dir = ensure(base, default_models(), say=print)
    value = {"data": {"train": [{"path": p} for p in args.data], "validation": 0.0}, "optim": {"batch_size": args.batch_size}}
    spec = resolve.defaults(JobSpec.parse(value), base)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(spec, model_dir, Path(scratch) / "stores", RunDir(Path(scratch) / "run", 1, "bench"), executor="local")
        store = TokenStore(Path(prepared.store), "train")
        spec = resolve.schedule(spec, len(store), Placement())
        order = Order(store.key, len(store), 1, args.batch_size, 0)
        mine, trainee = ours(spec, model_dir, store, order)
        peer = plain(spec, model_dir, store, order)
        for step in (mine, peer):
            step(0)  # the first step pays for what is made once
        rounds = []
        for number in range(1, args.rounds + 1):
            tokens = int(store.lengths[order.step(number)].sum())
            rounds.append((tokens / timed(mine, number), tokens / timed(peer, number)))
    rate = matmul_rate()
    our_rate, peer_rate = (statistics.median(column) for column in zip(*rounds, strict=True))
    result = {
        "what": "LoRA r16 all-linear, SmolLM2-135M, bf16, CPU, uncompiled",
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "data": [Path(p).name for p in args.data],
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "ours_tokens_per_s": round(our_rate, 1),
        "plain_peft_tokens_per_s": round(peer_rate, 1),
        "ratio": round(statistics.median(a / b for a, b in rounds), 2),
        "matmul_gflops": round(rate / 1e9),
        "share_of_matmul_peak": round(our_rate * flops_per_token(trainee) / rate, 3),
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
