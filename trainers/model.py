"""Load a base model for training, and the forward pass of one packed micro-batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from trainers import attention
from trainers.errors import ModelError
from trainers.loss import cross_entropy_sum

ARCHITECTURES = ("LlamaForCausalLM",)
"""What was tested end to end. A name that is not here is refused: a config file must not choose which code runs."""


def load(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", attn: str = attention.NAME) -> PreTrainedModel:
    """The model in `folder` (Hugging Face layout, safetensors only), in eval mode. Raises ModelError."""
    check(folder)
    disable_progress_bar()  # a worker's log is no terminal
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder.name} cannot be loaded: {str(error).splitlines()[0]}", "Check that the folder is complete.") from None
    return model.to(device).eval()  # type: ignore[arg-type]


def check(folder: Path) -> None:
    """Refuse what must not be loaded, before any of it is: remote code, unknown architectures, weights as pickles."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f"{folder} has no readable config.json.", "Name a Hugging Face model folder.", "model.base") from None
    if "auto_map" in config:
        raise ModelError(
            f"{folder.name} wants to run code of its own (`auto_map`).", "Use a model whose architecture transformers knows.", "model.base"
        )
    names = config.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise ModelError(f"{folder.name} is a {names[0]}.", f"Supported architectures: {', '.join(ARCHITECTURES)}.", "model.base")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder.name} holds no *.safetensors file.", "Convert its weights to safetensors.", "model.base")


@dataclass(frozen=True)
class MicroBatch:
    """One packed row. Letters: T tokens, N supervised positions."""

    ids_1T: Tensor
    packing: attention.Packing
    source_N: Tensor
    """int64: positions whose hidden state predicts a supervised token (the one before it)."""
    target_N: Tensor
    """int64: the supervised tokens."""
    weight_N: Tensor
    """float32: their loss weights."""

    @property
    def num_tokens(self) -> int:
        return self.ids_1T.shape[1]


def collate(examples: list[tuple[np.ndarray, np.ndarray]], device: torch.device | str = "cpu") -> MicroBatch:
    """Pack (ids, weights) pairs into one row. No examples give a dummy row that weighs nothing and changes nothing."""
    if not examples:
        examples = [(np.zeros(2, dtype=np.int32), np.zeros(2, dtype=np.float32))]
    examples = sorted(examples, key=lambda e: -len(e[0]))
    ids = np.concatenate([ids for ids, _ in examples]).astype(np.int64)
    weights = np.concatenate([weights for _, weights in examples])
    target_at = np.flatnonzero(weights)
    return MicroBatch(
        ids_1T=torch.from_numpy(ids)[None].to(device),
        packing=attention.pack([len(ids) for ids, _ in examples], device),
        source_N=torch.from_numpy(target_at - 1).to(device),  # an example's first token never has weight, so this stays inside it
        target_N=torch.from_numpy(ids[target_at]).to(device),
        weight_N=torch.from_numpy(weights[target_at].astype(np.float32)).to(device),
    )


class Trainee(nn.Module):
    """Body, supervised positions, chunked head and weighted loss sum in one forward: the root that sharding wraps."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(weighted loss sum in nats, weighted count of right predictions)."""
        body: Any = self.model.get_decoder()
        hidden_1TE = body(batch.ids_1T, position_ids=batch.packing.position_ids, use_cache=False, packing=batch.packing).last_hidden_state
        head_VE = self.model.get_output_embeddings().weight  # type: ignore[union-attr]
        return cross_entropy_sum(hidden_1TE[0].index_select(0, batch.source_N), head_VE, batch.target_N, batch.weight_N)
