"""What each weight of the tuned model is, given the base's: by LoRA, rsLoRA, DoRA, modules trained whole, QLoRA, or a full checkpoint.

    LoRA    W + s B A                                    (Hu et al., 2021, arXiv:2106.09685)
    DoRA    m (W + s B A) / |W + s B A|, row by row      (Liu et al., 2024, arXiv:2402.09353)
    QLoRA   the same, W being what four bits left of it  (Dettmers et al., 2023, arXiv:2305.14314)

One weight at a time, in fp32; the result is rounded once, to the dtype of the base's file. Shape letters: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainers.errors import ModelError
from trainers.tensors import Entry, ModelFolder, TensorFile

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PREFIX = "base_model.model."
UNREAD = (
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
)
"""Settings of PEFT that change what an adapter's tensors mean, and that training never sets."""


class Fold(Protocol):
    """A tuned model, weight by weight."""

    extra: list[Entry]
    """Tensors that the base's files do not hold: a head that was tied to the embedding and no longer is."""

    def value(self, entry: Entry, base: ModelFolder) -> Tensor:
        """The tuned weight in the base's dtype and shape."""
        ...

    def unused(self) -> list[str]:
        """What was trained and has not been asked for: after the last weight, none may be left."""
        ...


class AdapterFold:
    """A base and a PEFT adapter folder. `four_bits` maps a target's weight to what four bits leave of it."""

    def __init__(self, adapter: Path, base: ModelFolder, four_bits: Callable[[Tensor], Tensor] | None = None) -> None:
        config = adapter_config(adapter)
        self._file = TensorFile(adapter / "adapter_model.safetensors")
        self._four_bits = four_bits
        root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
        self._scaling = config["lora_alpha"] / root
        self._left = {name.removeprefix(PREFIX) for name in self._file.entries}
        self.extra = []
        if HEAD not in base and self._left & {HEAD, EMBEDDING}:  # the base's head is its embedding, and one of the two was trained
            if config.get("ensure_weight_tying"):
                self._left.discard(HEAD)  # a copy
            else:
                self.extra.append(Entry(HEAD, base[EMBEDDING].dtype, base[EMBEDDING].shape))

    def value(self, entry: Entry, base: ModelFolder) -> Tensor:
        module = entry.name.removesuffix(".weight")
        if entry.name in self._left:  # trained whole
            return self._take(entry.name).to(entry.dtype)
        if f"{module}.lora_A.weight" not in self._left:
            return base.read(entry.name if entry.name in base else EMBEDDING)
        weight_OI = base.read(entry.name)
        weight_OI = (self._four_bits(weight_OI) if self._four_bits else weight_OI).float()
        a_RI, b_OR = self._take(f"{module}.lora_A.weight").float(), self._take(f"{module}.lora_B.weight").float()
        if (b_OR.shape[0], a_RI.shape[1]) != entry.shape:
            told = f"{b_OR.shape[0]} by {a_RI.shape[1]}, not {entry.shape[0]} by {entry.shape[1]}"
            raise ModelError(f"The adapter of {module} is {told}.", "Merge it into the base it was trained on.")
        weight_OI.addmm_(b_OR, a_RI, alpha=self._scaling)
        if f"{module}.lora_magnitude_vector" in self._left:
            length_O = self._take(f"{module}.lora_magnitude_vector").float()
            weight_OI *= (length_O / torch.linalg.vector_norm(weight_OI, dim=1))[:, None]
        return weight_OI.to(entry.dtype)

    def unused(self) -> list[str]:
        return sorted(self._left)

    def _take(self, name: str) -> Tensor:
        self._left.discard(name)
        return self._file.read(PREFIX + name)


class FullFold:
    """Every weight from a checkpoint: `read(name)` gives `model.{name}` whole, `names` lists what it holds."""

    def __init__(self, names: list[str], read: Callable[[str], Tensor]) -> None:
        self._read = read
        self._known = {n.removeprefix("model.") for n in names if n.startswith("model.")}
        self._left = set(self._known)
        self.extra: list[Entry] = []

    def value(self, entry: Entry, base: ModelFolder) -> Tensor:
        if entry.name.endswith(".inv_freq"):  # a table that some old bases store
            return base.read(entry.name)
        return self.read(entry.name).to(entry.dtype)

    def read(self, name: str) -> Tensor:
        """A weight as it was trained; a tied head is the embedding."""
        name = EMBEDDING if name == HEAD and HEAD not in self._known else name
        if name not in self._known:
            raise ModelError(f"The checkpoint lacks {name}, which the base has.", "Merge it into the base it was trained on.")
        self._left.discard(name)
        return self._read(f"model.{name}")

    def unused(self) -> list[str]:
        return sorted(self._left)


def adapter_config(adapter: Path) -> dict[str, Any]:
    """A PEFT folder's settings. Raises ModelError for a kind of adapter that is not merged here."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f"{adapter} is no PEFT adapter folder: it has no readable adapter_config.json.", "Name one that is.") from None
    strange = next((key for key in UNREAD if config.get(key)), None)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or strange:
        kind = f"{config.get('peft_type')} with `{strange or 'bias'}`" if config.get("peft_type") == "LORA" else config.get("peft_type")
        raise ModelError(f"{adapter.name} is an adapter of type {kind}, which cannot be merged here.", "Merge it with PEFT.")
    return config
