"""The methods, by name. Each is a module of the same few functions over a model; none has a loop of its own.

apply(model, method)                     the structure: what is frozen, what is added; works without values (meta device)
initialise(model, method, seed, rank)    values that no file of the base holds, after its weights were read
export(tensors, method, base, folder)    what was learned, as a PEFT folder (adapters only)
line(model, method)                      what is trained, in words
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from trainers.spec import Full, Lora, QLora


def of(method: Lora | QLora | Full) -> ModuleType:
    """The module of a method: `trainers.full`, `trainers.lora` or `trainers.qlora`, loaded only where it is used."""
    return import_module(f"trainers.{method.type}")
