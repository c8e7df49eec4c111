"""Which adapters the shared base can answer with: plain LoRA. No torch here, so that the front door can ask too."""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": ([], None),
    "layer_replication": ([], None),
}
"""PEFT features that change the arithmetic, with the values that leave it plain."""


def beyond_plain(config: dict[str, Any]) -> str | None:
    """The first entry of an adapter_config.json that asks for more than plain LoRA (`use_dora: True`), or None."""
    return next((f"{key}: {config[key]}" for key, plain in PLAIN.items() if key in config and config[key] not in plain), None)
