"""Training speed: our loop beside its peers on the same steps, in one run.

    python -m tests.benchmarks.train [--methods lora full qlora] [--data FILE ...] [--rounds 5] [--output RESULT.json]

All train SmolLM2-135M in bf16, on the same examples in the same steps. Contenders take turns, step by step, so that a machine that slows
down slows all; ratios are medians over the turns. Peers: TRL's SFTTrainer as it comes (its collator, its loss, its optimizer), and, for
QLoRA, a plain loop with PEFT and bitsandbytes. Tokens are real ones: padding does not count. The machine's bf16 matmul rate, measured
between the rounds, says how much of it the loop uses; FLOPs are those the method needs (trainable and input gradients, head at supervised
positions, causal attention), not those spent.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch is loaded; see trainers/local.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from trainers import model, resolve
from trainers.batching import Order
from trainers.catalogue import find
from trainers.checkpoint import Progress
from trainers.fetch import default_models, ensure
from trainers.learner import Learner
from trainers.parallel import World
from trainers.prepare import prepare
from trainers.records import RunDir
from trainers.spec import JobSpec, Placement
from trainers.store import TokenStore
from trainers.train import train_step

ROOT = Path(__file__).parents[2]
RATE = 1e-4
Step = Callable[[int], None]


def matmul_rate(size: int = 2048, repeats: int = 10) -> float:
    """bf16 FLOP/s of one large matrix product, the best of three rounds."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        rates.append(2 * size**3 * repeats / (time.perf_counter() - start))
    return max(rates)


def needed(learner: Learner, store: TokenStore, chosen: np.ndarray) -> int:
    """FLOPs of a step that the method needs: 2 per weight and token for each product that is asked for."""
    tokens, supervised = int(store.lengths[chosen].sum()), int(store.supervised[chosen].sum())
    config: Any = learner.trainee.model.config
    adapters = sum(p.numel() for n, p in learner.parameters.items() if "lora_" in n)
    head = config.vocab_size * config.hidden_size
    body = config.num_hidden_layers * (
        2 * config.hidden_size**2 * (1 + config.num_key_value_heads / config.num_attention_heads)
        + 3 * config.hidden_size * config.intermediate_size
    )
    frozen = learner.spec.method.type != "full"
    squares = int((store.lengths[chosen].astype(np.int64) ** 2).sum())
    attention = 6 * squares * config.hidden_size * config.num_hidden_layers  # half a square, forward 2 products, backward 4
    return int((4 if frozen else 6) * (body * tokens + head * supervised) + 6 * adapters * tokens + attention)


def ours(spec: JobSpec, model_dir: Path, store: TokenStore, order: Order) -> tuple[Step, Learner]:
    learner = Learner.build(spec, model_dir, World())
    return lambda number: void(train_step(learner, store, order.step(number), Progress(step=number), RATE)), learner


def trl(spec: JobSpec, model_dir: Path, store: TokenStore, order: Order, dtype: torch.dtype) -> Step:
    """SFTTrainer on the same token ids; its own step, in the order of its training loop."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.utils.logging import set_verbosity_error
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    set_verbosity_error()
    visited = np.concatenate([order.step(s) for s in range(order.num_steps)])
    rows = [store.get(int(i)) for i in visited]
    data = Dataset.from_list([{"input_ids": ids.tolist(), "labels": np.where(w > 0, ids, -100).tolist()} for ids, w in rows])
    size = int(spec.optim.batch_size)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size, learning_rate=RATE, lr_scheduler_type="constant", bf16=True,
        max_length=None, completion_only_loss=True, gradient_checkpointing=False, report_to=[], use_cpu=True, max_steps=10_000,
        dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True,
    )  # fmt: skip
    method = spec.method
    lora = None
    if method.type == "lora":
        lora = LoraConfig(r=method.r, lora_alpha=int(method.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    trainer: Any = SFTTrainer(
        model=model.load(model_dir, dtype, attn="sdpa"),
        args=config,
        train_dataset=data,
        peft_config=lora,
        processing_class=tokenizer(model_dir),
    )
    trainer.create_optimizer_and_scheduler(10_000)
    network, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    network.train()

    def step(number: int) -> None:
        batch = trainer.data_collator([data[i] for i in range(number * size, number * size + len(order.step(number)))])
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(network, batch, torch.tensor(int((batch["labels"] != -100).sum())))
        trainer.accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_qlora(spec: JobSpec, model_dir: Path, store: TokenStore, order: Order) -> Step:
    """What one writes first: PEFT over bitsandbytes' four-bit layers, a padded batch, labels, the model's own loss."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=quantized, dtype=torch.bfloat16)
    method: Any = spec.method
    config = LoraConfig(r=method.r, lora_alpha=int(method.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    peer = get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), config).train()
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=RATE)

    def step(number: int) -> None:
        rows = [store.get(int(i)) for i in order.step(number)]
        ids_BL = torch.zeros(len(rows), max(len(ids) for ids, _ in rows), dtype=torch.long)
        labels_BL, mask_BL = torch.full_like(ids_BL, -100), torch.zeros_like(ids_BL)
        for row, (ids, weights) in enumerate(rows):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            labels_BL[row, : len(ids)][torch.tensor(weights) > 0] = ids_BL[row, : len(ids)][torch.tensor(weights) > 0]
            mask_BL[row, : len(ids)] = 1
        with torch.autocast("cpu", torch.bfloat16):
            peer(input_ids=ids_BL, attention_mask=mask_BL, labels=labels_BL).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def void(_: object) -> None:
    return None


def timed(step: Step, number: int) -> float:
    start = time.perf_counter()
    step(number)
    return time.perf_counter() - start


def measure(method: str, args: argparse.Namespace, model_dir: Path, scratch: Path) -> dict[str, Any]:
    """All contenders of one method, in turns."""
    base = find("smollm2-135m-instruct")
    value = {
        "data": {"train": [{"path": p} for p in args.data], "validation": 0.0},
        "method": {"type": method},
        "optim": {"batch_size": args.batch_size},
    }
    spec = resolve.defaults(JobSpec.parse(value), base)
    prepared = prepare(spec, model_dir, scratch / "stores", RunDir(scratch / method, 1, "bench"), executor="local")
    store = TokenStore(Path(prepared.store), "train")
    spec = resolve.schedule(spec, len(store), Placement())
    order = Order(store.key, len(store), 1, args.batch_size, 0)
    mine, learner = ours(spec, model_dir, store, order)
    steps: dict[str, Step] = {"ours": mine}
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "lora":
            steps["trl"] = trl(spec, model_dir, store, order, torch.bfloat16)
        elif method == "full":
            steps["trl"] = trl(spec, model_dir, store, order, torch.bfloat16)
            steps["trl with fp32 masters"] = trl(spec, model_dir, store, order, torch.float32)
        else:
            steps["peft + bitsandbytes"] = plain_qlora(spec, model_dir, store, order)
        for step in steps.values():
            step(0)  # the first step pays for what is made once
        rates: dict[str, list[float]] = {name: [] for name in steps}
        shares: list[float] = []
        for number in range(1, args.rounds + 1):
            chosen = order.step(number)
            tokens = int(store.lengths[chosen].sum())
            peak = matmul_rate()
            for name, step in steps.items():
                rates[name].append(tokens / timed(step, number))
            shares.append(needed(learner, store, chosen) * rates["ours"][-1] / tokens / peak)
    return {
        "tokens_per_s": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "ratio": {
            name: round(statistics.median(a / b for a, b in zip(rates["ours"], found, strict=True)), 2)
            for name, found in rates.items()
            if name != "ours"
        },
        "share_of_matmul_peak": round(statistics.median(shares), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["lora", "full", "qlora"], choices=["lora", "full", "qlora"])
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "examples/task_api/train.jsonl")], help="training files in any format")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()

    model_dir = ensure(find("smollm2-135m-instruct"), default_models(), say=print)
    result: dict[str, Any] = {
        "what": "SmolLM2-135M, bf16, CPU, uncompiled; adapters r16 on all linear layers",
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "load": round(os.getloadavg()[0], 1),
        "data": [Path(p).name for p in args.data],
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "matmul_gflops": round(matmul_rate() / 1e9),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for method in args.methods:
            result[method] = measure(method, args, model_dir, Path(scratch))
            print(json.dumps({method: result[method]}, indent=2), flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
