"""Fold an adapter into its base, one shard of the base at a time: W + s B A, written as a Hugging Face folder.

Peak memory is one shard and one fp32 copy of its largest matrix. The result is checked before it exists: its logits must agree
with base + adapter on real prompts.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainers import checkpoint, lora, model
from trainers.card import card
from trainers.chat import Chat
from trainers.errors import ModelError
from trainers.records import TEMPLATE_FILE, ModelRecord, RunDir, sync_folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    TEMPLATE_FILE,
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)


def merge(run: RunDir, base: str, model_dir: Path, step: int, prompts: list[list[int]], write: bool = True) -> ModelRecord:
    """Make `model/` in the run directory from the base and the adapter of `step`, and record it as `model.json`.

    `prompts` are token ids on which merged and unmerged are compared. With `write=False` only the record is made.
    """
    done = run.read("model.json", ModelRecord)
    if done is not None and done.step == step:
        return done
    adapter = f"adapters/{checkpoint.adapter_name(step)}"
    record = ModelRecord(base=base, adapter=adapter, merged=None, step=step)
    if write:
        target, scratch = run.path("model"), run.path(f".model.a{run.attempt}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        write_merged(model_dir, run.path(adapter), scratch)
        found = compare(model_dir, run.path(adapter), scratch, prompts)
        (scratch / "README.md").write_text(card(run, base, step), encoding="utf-8")
        run.check_lease()
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
        sync_folder(target.parent)
        record = record.model_copy(update={"merged": "model", **asdict(found)})
    return run.write("model.json", record)


def write_merged(model_dir: Path, adapter: Path, out: Path) -> None:
    """Copy the base folder, shard by shard, adding each adapter to its matrix in fp32."""
    deltas = read_adapter(adapter)
    for shard in sorted(model_dir.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                if name in deltas:
                    a_RI, b_OR, scaling = deltas.pop(name)
                    tensor = (tensor.float() + scaling * (b_OR @ a_RI)).to(tensor.dtype)
                tensors[name] = tensor.contiguous()
        save_file(tensors, out / shard.name, metadata={"format": "pt"})
    if deltas:
        raise ModelError(
            f"The adapter changes {next(iter(deltas))}, which the base does not have.", "Merge it into the base it was trained on."
        )
    for name in (*TOKENIZER_FILES, "model.safetensors.index.json"):
        if (model_dir / name).exists():
            shutil.copyfile(model_dir / name, out / name)
    if (adapter / TEMPLATE_FILE).exists():
        carry_template(adapter, out)


def carry_template(adapter: Path, out: Path) -> None:
    """Give a model folder the template its adapter was trained with, and let generation end where that ends a turn."""
    shutil.copyfile(adapter / TEMPLATE_FILE, out / TEMPLATE_FILE)
    file = out / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    ends = sorted(Chat.load(out).stop_ids)
    known = config.get("eos_token_id")
    if set(ends) - {*(known if isinstance(known, list) else [known])}:
        file.write_text(json.dumps({**config, "eos_token_id": ends}, indent=2), encoding="utf-8")


def read_adapter(adapter: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A PEFT LoRA folder as {name of the base weight: (A, B, scaling)}, A (R, I) and B (O, R) in fp32."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]
    scaling = lora.scaling(config["r"], config["lora_alpha"], config.get("use_rslora", False))
    return {
        f"{name.removeprefix('base_model.model.')}.weight": (
            tensors[f"{name}.lora_A.weight"].float(),
            tensors[f"{name}.lora_B.weight"].float(),
            scaling,
        )
        for name in names
    }


@dataclass(frozen=True)
class Agreement:
    """How far two models are apart on some prompts, computed in fp32."""

    kl: float
    """Mean KL divergence of the next-token distributions, merged from base + adapter, in nats per token."""
    effect: float
    """The same, base from base + adapter: what the adapter itself does."""
    max_logit_difference: float


@torch.no_grad()
def compare(model_dir: Path, adapter: Path, merged: Path, prompts: list[list[int]]) -> Agreement:
    """Hold the merged model against base + adapter; raises ModelError where they disagree.

    What may be left is the rounding of merged weights to the base's dtype: measured 1.4e-4 nats in bf16 where the adapter's own effect was
    1.5. They agree below 1% of that effect, plus 5e-4 for the rounding; a wrong scale or a missing layer is far above.
    """
    from peft import PeftModel  # the unmerged side is computed by PEFT, so that no mistake of ours is on both sides

    def logits(of: Any) -> Tensor:
        return torch.cat([of(torch.tensor([ids])).logits[0] for ids in prompts])

    reference = PeftModel.from_pretrained(model.load(model_dir, torch.float32, attn="sdpa"), adapter)
    want_NV = logits(reference)
    with reference.disable_adapter():
        base_NV = logits(reference)
    del reference
    got_NV = logits(model.load(merged, torch.float32, attn="sdpa"))
    found = Agreement(_kl(got_NV, want_NV), _kl(base_NV, want_NV), (got_NV - want_NV).abs().max().item())
    if not found.kl <= 0.01 * found.effect + 5e-4:
        raise ModelError(
            f"The merged model does not agree with base + adapter (KL {found.kl:.2g} nats; the adapter's own effect: {found.effect:.2g}).",
            "Set `export.merge` to false to serve the adapter alone, and report this.",
        )
    return found


def _kl(got_NV: Tensor, want_NV: Tensor) -> float:
    """Mean over N of KL(want || got)."""
    got_NV, want_NV = got_NV.log_softmax(-1), want_NV.log_softmax(-1)
    return torch.nn.functional.kl_div(got_NV, want_NV, log_target=True, reduction="batchmean").item()


def probes(chat: Chat) -> list[list[int]]:
    """A few prompts to compare models on."""
    questions = ("Say hello.", "What is 12 + 30?", "List three colours as JSON.", "Write one sentence about the sea.")
    return [chat.prompt([{"role": "user", "content": question}]) for question in questions]
