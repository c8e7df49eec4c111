"""Random numbers that depend on what they are for, never on when they are drawn.

Dropout and NEFTune need noise for every (token, feature). Here it is a hash of (seed, step, example, position) and (layer, feature), so
packing, micro-batches, workers, recomputation and resuming do not change it. Hashes are 32-bit (finalizers of SplitMix64 and MurmurHash3).
Shape letters: T tokens of a micro-batch, F features of a layer.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


def token_keys(seed: int, step: int, example: int, length: int) -> np.ndarray:
    """int32[length]: a key for each token of the example at place `example` of a step."""
    base = int.from_bytes(hashlib.sha256(f"{seed}/{step}/{example}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.uint64(base) + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(32)).astype(np.uint32).view(np.int32)


class Layer(Protocol):
    """A layer with dropout."""

    name: str
    dropout: float


class Noise:
    """What the layers of one model need to know: the keys of the micro-batch that is computed now. Without keys there is no noise."""

    def __init__(self) -> None:
        self.keys_T: Tensor | None = None

    def dropout(self, x_TF: Tensor, layer: Layer) -> Tensor:
        """`x_TF` with a share of its numbers zeroed and the rest scaled up to the same mean (Srivastava et al., 2014)."""
        return x_TF if self.keys_T is None else _dropped(x_TF, self.keys_T, layer)  # type: ignore[call-arg]

    def uniform(self, x_TF: Tensor, layer: str) -> Tensor:
        """Uniform in [-1, 1), of the shape and dtype of `x_TF`."""
        assert self.keys_T is not None
        return (_bits(x_TF, self.keys_T, layer).to(torch.float32) * 2.0**-31).to(x_TF.dtype)


@torch.compiler.disable  # a compiled block would be compiled again for each layer's name
def _dropped(x_TF: Tensor, keys_T: Tensor, layer: Layer) -> Tensor:
    kept_TF = (_bits(x_TF, keys_T, layer.name) & 0x7FFFFFFF) >= int(layer.dropout * 2**31)
    return x_TF * (kept_TF.to(x_TF.dtype) * (1 / (1 - layer.dropout)))


def _bits(x_TF: Tensor, keys_T: Tensor, layer: str) -> Tensor:
    """32 random bits for each number of `x_TF`, as int32."""
    x = keys_T[:, None] ^ _feature_keys(layer, x_TF.shape[-1], str(x_TF.device))[None]
    for shift, factor in ((16, -2048144789), (13, -1028477387)):  # 0x85EBCA6B, 0xC2B2AE35 as int32
        x = (x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))) * factor
    return x ^ ((x >> 16) & 0xFFFF)


@lru_cache(maxsize=4096)
def _feature_keys(layer: str, num_features: int, device: str) -> Tensor:
    keys = token_keys(0, 0, int.from_bytes(hashlib.sha256(layer.encode()).digest()[:7], "little"), num_features)
    return torch.from_numpy(keys).to(device)
