"""Base models on offer: where they come from, their names, licence, context and default rates. No torch here."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from trainers.errors import UnknownModel

RATES = {"lora": 2e-4, "qlora": 2e-4, "full": 1e-5}
"""Peak learning rates of a base that the catalogue does not know."""


class Package(BaseModel):
    """A Python package that carries a model's weights as one GGUF file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str
    file: str
    """The GGUF file's path inside the package."""
    sha256: str
    pre_tokenizer: str
    """What the file names but does not hold: `digits` splits numbers into single digits before BPE."""


class Base(BaseModel):
    """One base model. `learning_rate` maps a method to its default peak rate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    hub: str | None = None
    package: Package | None = None
    folder: str | None = None
    """A local Hugging Face folder (a user's own base; never set in the catalogue)."""
    licence: str
    context: int
    """Longest sequence, in tokens."""
    learning_rate: dict[str, float]
    batch_size: int
    aliases: tuple[str, ...] = ()
    shape: dict[str, Any] = {}
    """What config.json says of the model's size, so that a job can be planned before anything is downloaded."""


@cache
def catalogue() -> dict[str, Base]:
    """Every base on offer, by id."""
    entries = yaml.safe_load((Path(__file__).parent / "catalogue.yaml").read_text(encoding="utf-8"))
    return {id: Base(id=id, **entry) for id, entry in entries.items()}


def find(name: str) -> Base:
    """The base that an id or alias names; raises UnknownModel with the nearest name."""
    for base in catalogue().values():
        if name == base.id or name in base.aliases:
            return base
    known = [n for base in catalogue().values() for n in (base.id, *base.aliases)]
    near = difflib.get_close_matches(name, known, n=1)
    raise UnknownModel(
        f"There is no base model `{name}`.",
        f"Did you mean `{near[0]}`?" if near else f"On offer: {', '.join(known)}.",
        "model",
    )


def find_any(name: str) -> Base:
    """Like `find`, for the command line: also takes a local Hugging Face folder or a hub id (`org/name`)."""
    if Path(name).is_dir() and (Path(name) / "config.json").exists():
        folder = Path(name).resolve()
        return Base(
            id=folder.name.lower(),
            folder=str(folder),
            licence="unknown",
            context=context_of(folder),
            learning_rate=RATES,
            batch_size=16,
        )
    if known := next((base for base in catalogue().values() if name == base.hub), None):
        return known
    if "/" in name and not Path(name).exists():
        return Base(id=name.split("/")[-1].lower(), hub=name, licence="unknown", context=2048, learning_rate=RATES, batch_size=16)
    return find(name)


def context_of(folder: Path) -> int:
    """Longest sequence, in tokens, of the model in a Hugging Face folder."""
    config = yaml.safe_load((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("max_position_embeddings", 2048))
