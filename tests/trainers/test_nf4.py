"""Four-bit weights are bitsandbytes' own, bit for bit."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from trainers import nf4

NF4_LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Like a trained one: normal, with a few large values."""
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03
    w_OI.view(-1)[::997] *= 12
    return w_OI


@pytest.mark.parametrize("shape", [(96, 64), (300, 576), (30, 22), (7, 2)])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_bitsandbytes(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    w_OI = weight(*shape).to(torch.bfloat16)
    codes, state = bnb.quantize_4bit(w_OI, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    state.dtype = dtype
    expected = bnb.dequantize_4bit(codes, state)
    for chunk in (nf4.CHUNK, 4096):  # packed in one piece or in several
        monkeypatch.setattr(nf4, "CHUNK", chunk)
        packed = nf4.quantize(w_OI, double_quant)
        assert torch.equal(packed.codes, codes.view(-1))
        assert torch.equal(packed.scales_B, state.absmax)
        assert torch.equal(nf4.dequantize(packed, shape, dtype), expected)
        assert torch.equal(nf4.round_trip(w_OI, double_quant, dtype), expected)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    return levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]


def test_equals_its_definition() -> None:
    """Levels and scales written out in plain torch, without a kernel."""
    w_OI = weight(300, 576).to(torch.bfloat16)
    blocks = w_OI.float().view(-1, 64)
    scales = blocks.abs().amax(1)
    levels = nearest(blocks * (1 / scales)[:, None], torch.tensor(NF4_LEVELS))
    assert torch.equal(nf4.round_trip(w_OI, False, torch.float32), (levels * scales[:, None]).view_as(w_OI))
    assert torch.equal(nf4.round_trip(w_OI, False), (levels * scales[:, None]).view_as(w_OI).to(torch.bfloat16))

    doubled = nf4.round_trip(w_OI, True, torch.float32).view(-1, 64)
    kept = doubled.abs().amax(1)  # a block holds its largest level, 1, once at least
    torch.testing.assert_close(doubled, levels * kept[:, None])
    for start in range(0, len(scales), 256):
        part = scales[start : start + 256]
        largest = (part - scales.mean()).abs().max()
        best = nearest((part - scales.mean()) / largest, bnb.create_dynamic_map()) * largest + scales.mean()
        assert (
            (kept[start : start + 256] - part).abs() <= (best - part).abs() + 1e-4 * largest
        ).all()  # the CPU kernel's search is not quite exact


def test_a_files_dtype_changes_nothing() -> None:
    w_OI = weight(64, 64)
    rounded = w_OI.to(torch.bfloat16)
    assert torch.equal(nf4.round_trip(w_OI), nf4.round_trip(rounded))
    assert torch.equal(nf4.round_trip(rounded.float()), nf4.round_trip(rounded))


def test_bits_per_weight() -> None:
    def bits(double_quant: bool) -> float:
        packed = nf4.quantize(weight(1536, 576), double_quant)
        return 8 * sum(t.numel() * t.element_size() for t in packed if t is not None) / (1536 * 576)

    assert bits(True) == pytest.approx(4.127, abs=1e-3)
    assert bits(False) == 4.5
