"""Training speed of QLoRA: our step beside a plain PEFT + bitsandbytes loop on the same examples, in one run.

    python -m tests.benchmarks.qlora [--data FILE ...] [--rounds 5] [--output RESULT.json]

Both train a LoRA r16 on all linear layers of SmolLM2-135M, its body in NF4 with double quantisation, in bf16. The peer is what PEFT's
guide says: BitsAndBytesConfig, prepare_model_for_kbit_training, a padded batch; with and without the gradient checkpointing that this
turns on. They take turns, step by step; ratios are medians over the turns, in real tokens a second. Memory is the body's own, packed.
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
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch is loaded; see trainers/local.py

import torch

from trainers import resolve
from trainers.batching import Order
from trainers.catalogue import find
from trainers.checkpoint import Progress
from trainers.fetch import default_models, ensure
from trainers.learner import Learner
from trainers.parallel import World
from trainers.prepare import prepare
from trainers.qlora import QLoraLinear
from trainers.records import RunDir
from trainers.spec import JobSpec, Placement
from trainers.store import TokenStore
from trainers.train import train_step

ROOT = Path(__file__).parents[2]
Step = Callable[[int], float]


def ours(spec: JobSpec, model_dir: Path, store: TokenStore, order: Order) -> tuple[Step, Learner]:
    learner = Learner.build(spec, model_dir, World())
    return lambda number: train_step(learner, store, order.step(number), Progress(step=number), 1e-4).measured.loss, learner


def plain(spec: JobSpec, model_dir: Path, store: TokenStore, order: Order, checkpointing: bool) -> Step:
    """What one writes first."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    method: Any = spec.method
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    bare = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, quantization_config=packed, device_map={"": "cpu"})
    bare = prepare_model_for_kbit_training(bare, use_gradient_checkpointing=checkpointing)
    config = LoraConfig(r=method.r, lora_alpha=int(method.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    peer = get_peft_model(bare, config).train()
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4)

    def step(number: int) -> float:
        examples = [store.get(int(i)) for i in order.step(number)]
        longest = max(len(ids) for ids, _ in examples)
        ids_BL = torch.zeros(len(examples), longest, dtype=torch.long)
        labels_BL, mask_BL = torch.full_like(ids_BL, -100), torch.zeros_like(ids_BL)
        for row, (ids, weights) in enumerate(examples):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            labels_BL[row, : len(ids)][torch.tensor(weights) > 0] = ids_BL[row, : len(ids)][torch.tensor(weights) > 0]
            mask_BL[row, : len(ids)] = 1
        loss = peer(input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def bytes_of(learner: Learner) -> dict[str, float]:
    layers = [m for m in learner.trainee.modules() if isinstance(m, QLoraLinear)]
    weights = sum(m.shape[0] * m.shape[1] for m in layers)
    packed = sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
    return {"body_weights": weights, "body_mb": round(packed / 1e6, 1), "body_mb_in_bf16": round(2 * weights / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "examples/task_api/train.jsonl")], help="training files in any format")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()

    base = find("smollm2-135m-instruct")
    model_dir = ensure(base, default_models(), say=print)
    value = {
        "data": {"train": [{"path": p} for p in args.data], "validation": 0.0},
        "method": {"type": "qlora"},
        "optim": {"batch_size": args.batch_size},
    }
    spec = resolve.defaults(JobSpec.parse(value), base)
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(spec, model_dir, Path(scratch) / "stores", RunDir(Path(scratch) / "run", 1, "bench"), executor="local")
        store = TokenStore(Path(prepared.store), "train")
        spec = resolve.schedule(spec, len(store), Placement())
        order = Order(store.key, len(store), 1, args.batch_size, 0)
        mine, learner = ours(spec, model_dir, store, order)
        peers = {c: plain(spec, model_dir, store, order, c) for c in (True, False)}
        losses = [round(step(0), 4) for step in (mine, *peers.values())]  # the first step pays for what is made once
        rounds: list[list[float]] = []
        for number in range(1, args.rounds + 1):
            tokens = int(store.lengths[order.step(number)].sum())
            rates = []
            for step in (mine, *peers.values()):
                start = time.perf_counter()
                step(number)
                rates.append(tokens / (time.perf_counter() - start))
            rounds.append(rates)
            print(number, tokens, [round(r, 1) for r in rates], flush=True)
    medians = [round(statistics.median(column), 1) for column in zip(*rounds, strict=True)]
    result = {
        "what": "QLoRA r16 all-linear, SmolLM2-135M, NF4 with double quantisation, bf16, CPU, uncompiled",
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "data": [Path(p).name for p in args.data],
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "first_losses": losses,
        "ours_tokens_per_s": medians[0],
        "plain_tokens_per_s": medians[1],
        "plain_without_checkpointing_tokens_per_s": medians[2],
        "ratio": round(statistics.median(r[0] / r[1] for r in rounds), 2),
        "ratio_without_checkpointing": round(statistics.median(r[0] / r[2] for r in rounds), 2),
        **bytes_of(learner),
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
