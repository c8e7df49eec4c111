"""A weight in four bits: NF4 with double quantisation (Dettmers et al., 2023, arXiv:2305.14314), bit for bit as bitsandbytes holds it.

Each block of 64 weights is divided by its largest magnitude and rounded to one of 16 levels, the quantiles of a normal distribution. The
blocks' scales, less their mean, are themselves kept in 8 bits, 256 to a block (8-bit dynamic code; Dettmers et al., 2022): 4.13 bits a
weight in all, 4.5 without that second level.

Shape letters: I inputs, O outputs, B blocks of weights, S blocks of scales.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Weights that share a scale."""
SCALE_BLOCK = 256
"""Scales that share a scale of their own."""
CHUNK = 2**18
"""Weights rounded at once. On the host each takes over 20 bytes of scratch, and of larger pieces malloc keeps what it got."""


class Packed(NamedTuple):
    """A matrix in four bits."""

    codes: Tensor
    """uint8 (O*I/2,): two weights to a byte, the first in its upper half."""
    scales_B: Tensor
    """uint8, or float32 without double quantisation."""
    scales_S: Tensor | None
    """float32: what the blocks of `scales_B` are scaled by."""
    mean: Tensor | None
    """float32 (): added to every scale."""


def quantize(w_OI: Tensor, double_quant: bool = True) -> Packed:
    """Pack a weight, on the device where it lies.

    It is rounded to bf16 first, whatever dtype its file has: so do transformers and bitsandbytes where a model is loaded in bf16.
    """
    bnb = bitsandbytes()
    flat = w_OI.detach().reshape(-1)
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    scales_B = torch.empty(math.ceil(flat.numel() / BLOCK), dtype=torch.float32, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):  # blocks do not know of each other, so the chunk's size changes nothing
        chunk = flat[start : start + CHUNK].to(torch.bfloat16)
        packed, state = bnb.quantize_4bit(chunk, blocksize=BLOCK, quant_type="nf4")
        codes[start // 2 : start // 2 + packed.numel()] = packed.view(-1)
        scales_B[start // BLOCK : start // BLOCK + state.absmax.numel()] = state.absmax
    if not double_quant:
        return Packed(codes, scales_B, None, None)
    # On the host, whatever the device: kernels differ in how they look for the nearest of the 256 levels, and a merge on another machine
    # must find the scales that training held.
    scales_B = scales_B.cpu()
    mean = scales_B.mean()
    scales, state = bnb.quantize_blockwise(scales_B - mean, code=dynamic_code(scales_B.device), blocksize=SCALE_BLOCK)
    return Packed(codes, scales.to(flat.device), state.absmax.to(flat.device), mean.to(flat.device))


def dequantize(packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight (O, I) that `packed` stands for, in any float dtype."""
    scales_B = packed.scales_B
    if packed.scales_S is not None and packed.mean is not None:
        code = dynamic_code(scales_B.device)
        scales_B = torch.ops.bitsandbytes.dequantize_blockwise.default(scales_B, packed.scales_S, code, SCALE_BLOCK, torch.float32)
        scales_B += packed.mean
    known = torch.float32 if dtype == torch.float64 else dtype
    return torch.ops.bitsandbytes.dequantize_4bit.default(packed.codes.view(-1, 1), scales_B, BLOCK, "nf4", list(shape), known).to(dtype)


def round_trip(w_OI: Tensor, double_quant: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight as QLoRA multiplies by it: packed and unpacked again. `dtype` is that of training's arithmetic."""
    return dequantize(quantize(w_OI, double_quant), w_OI.shape, dtype)


@functools.cache
def bitsandbytes() -> Any:
    """bitsandbytes' functions and, as `torch.ops.bitsandbytes`, its kernels; loaded (0.8 s) where they are used."""
    # It warns at import that an optional kernel for inference cannot be fetched.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


def dynamic_code(device: torch.device, signed: bool = True) -> Tensor:
    """The 256 levels of the 8-bit dynamic code, float32."""
    if (device, signed) not in _codes:
        _codes[device, signed] = bitsandbytes().create_dynamic_map(signed).to(device)
    return _codes[device, signed]


_codes: dict[tuple[torch.device, bool], Tensor] = {}  # a plain dict, through which torch.compile can see
