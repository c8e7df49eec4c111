"""The sizes that decide a model's memory, from its config.json or the catalogue. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.catalogue import Base
from trainers.errors import SpecError


@dataclass(frozen=True)
class ModelShape:
    """What of a Llama's config.json decides its memory."""

    hidden: int
    intermediate: int
    layers: int
    query: int
    """Width of all query heads together."""
    key: int
    """Width of all key heads together; the values' too."""
    heads: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the keys of a config.json. Raises SpecError where one is missing."""
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            size = int(config.get("head_dim") or hidden // heads)
            return cls(
                hidden=hidden,
                intermediate=int(config["intermediate_size"]),
                layers=int(config["num_hidden_layers"]),
                query=heads * size,
                key=int(config.get("num_key_value_heads") or heads) * size,
                heads=heads,
                vocab=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"The model's config.json does not say its size: {error}.", "Name a Llama's folder.", "model.base") from None

    @classmethod
    def of_base(cls, base: Base, models: Path | None = None) -> ModelShape:
        """From the catalogue, or from the config.json of a base that is on this machine."""
        if base.shape:
            return cls.of(base.shape)
        for folder in (base.folder and Path(base.folder), models and models / base.id):
            if folder and (folder / "config.json").exists():
                return cls.of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        raise SpecError(f"The size of {base.id} is not known here.", "Name a base of the catalogue, or a local folder.", "model.base")

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a block's linear layers."""
        e, f = self.hidden, self.intermediate
        attention = {"q_proj": (e, self.query), "k_proj": (e, self.key), "v_proj": (e, self.key), "o_proj": (self.query, e)}
        return attention | {"gate_proj": (e, f), "up_proj": (e, f), "down_proj": (f, e)}

    @property
    def linear(self) -> int:
        """Weights of a block's linear layers."""
        return sum(i * o for i, o in self.linears.values())

    @property
    def block(self) -> int:
        """Weights of a block."""
        return self.linear + 2 * self.hidden

    @property
    def root(self) -> int:
        """Weights outside the blocks: embedding, last norm, head."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def total(self) -> int:
        return self.layers * self.block + self.root
