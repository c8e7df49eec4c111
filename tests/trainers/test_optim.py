"""Optimizers beside torch's and bitsandbytes' own, and their state through a resume."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, zeros
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainers import adam8bit, adam_bf16, optim, shards
from trainers.errors import SpecError
from trainers.spec import Optim

KINDS: dict[str, Any] = {
    "adamw": ({"type": "adamw"}, "fp32", torch.float32),
    "adamw8bit": ({"type": "adamw8bit"}, "fp32", torch.float32),
    "bf16": ({"type": "adamw"}, "bf16", torch.bfloat16),
}
SHAPES = {"matrix": (65, 80), "small": (7, 5), "norm": (33,)}


def weights(dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).mul_(0.02).to(dtype) for n, s in shapes.items()}


def give_gradients(masters: dict[str, Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for master in masters.values():
        master.grad = torch.randn(master.shape, generator=generator).mul_(0.1).to(master.dtype)


def build(kind: str, masters: dict[str, Tensor], seed: int = 0, **options: Any) -> torch.optim.Optimizer:
    value, master, _ = KINDS[kind]
    return optim.build(masters, Optim.model_validate({"learning_rate": 1e-3, "weight_decay": 0.1, **value, **options}), master, seed)


def steps(optimizer: torch.optim.Optimizer, masters: dict[str, Tensor], numbers: range) -> None:
    for number in numbers:
        give_gradients(masters, number)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + number)
        optimizer.step()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_adamw_is_torchs_own() -> None:
    ours, theirs = weights(), weights()
    matrices = [t for t in theirs.values() if t.dim() > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}]
    steps(build("adamw", ours), ours, range(5))
    steps(torch.optim.AdamW(groups, lr=1e-3, fused=True), theirs, range(5))
    assert equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_there_at_once_and_resumes_to_the_bit(kind: str) -> None:
    dtype = KINDS[kind][2]
    straight = weights(dtype)
    optimizer = build(kind, straight)
    slots = optim.state(optimizer, straight)
    assert all(not slot.any() for slot in slots.values())
    assert {f"{n}.{s}" for n in SHAPES for s in ("step", "exp_avg", "exp_avg_sq")} <= slots.keys()
    steps(optimizer, straight, range(3))
    assert all(a is b for a, b in zip(slots.values(), optim.state(optimizer, straight).values(), strict=True))  # updated in place
    kept = {n: t.clone() for n, t in {**straight, **slots}.items()}
    steps(optimizer, straight, range(3, 6))

    resumed = weights(dtype, seed=2)
    again = build(kind, resumed)
    for name, tensor in {**resumed, **optim.state(again, resumed)}.items():
        tensor.copy_(kept[name])
    steps(again, resumed, range(3, 6))
    assert equal(straight, resumed)
    assert equal(optim.state(optimizer, straight), optim.state(again, resumed))


def test_only_matrices_decay() -> None:
    for kind, (_, _, dtype) in KINDS.items():
        masters = {n: torch.ones(s, dtype=dtype) for n, s in SHAPES.items()}
        optimizer = build(kind, masters, weight_decay=0.5)
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        optimizer.step()
        assert masters["matrix"].float().mean() == pytest.approx(0.75), kind
        assert masters["small"].float().mean() == pytest.approx(0.75), kind
        assert torch.equal(masters["norm"], torch.ones_like(masters["norm"])), kind


@pytest.mark.parametrize("chunk", [adam8bit.CHUNK, 1024])
def test_8_bits_are_bitsandbytes_own(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam8bit, "CHUNK", chunk)
    ours, theirs = weights(), {n: torch.nn.Parameter(t) for n, t in weights().items()}
    groups = [{"params": [theirs["matrix"], theirs["small"]], "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}]
    steps(build("adamw8bit", ours), ours, range(5))
    steps(bitsandbytes.optim.AdamW8bit(groups, lr=1e-3), theirs, range(5))  # type: ignore[arg-type]
    assert equal(ours, {n: t.detach() for n, t in theirs.items()})


def test_8_bits_take_2_bytes_a_weight() -> None:
    masters = weights(shapes={"matrix": (512, 512)})
    slots = optim.state(build("adamw8bit", masters), masters)
    assert sum(s.numel() * s.element_size() for s in slots.values()) / 512**2 == pytest.approx(2 + 8 / 256, abs=1e-4)
    bf16 = weights(torch.bfloat16, {"matrix": (512, 512)})
    slots = optim.state(build("bf16", bf16), bf16)
    assert sum(s.numel() * s.element_size() for s in slots.values()) / 512**2 == pytest.approx(4, abs=1e-4)


class Regression:
    """Weights of 0.02 or so that are to move by a few hundredths of themselves: least squares in 64 x 80 unknowns, a fresh batch a step."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.start = torch.randn(64, 80, generator=generator) * 0.02
        self.goal = self.start + torch.randn(64, 80, generator=generator).sign() * 1e-3

    def loss(self, w: Tensor) -> float:
        return float((w.float() - self.goal).square().mean() / (self.start - self.goal).square().mean())

    def train(self, w: Tensor, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
        losses = []
        for step in range(num_steps):
            x = torch.randn(32, 80, generator=torch.Generator().manual_seed(step))
            w.grad = ((x @ (w.detach().float() - self.goal).T).T @ x / 32).to(w.dtype)
            optimizer.step()
            losses.append(self.loss(w.detach()))
        return losses


@pytest.mark.parametrize("kind", ["bf16", "adamw8bit"])
def test_follows_fp32_where_plain_rounding_learns_nothing(kind: str) -> None:
    """Learning rate 1e-5 for 150 steps. A bf16 step at 0.02 is 1.2e-4: twelve times an update."""
    problem = Regression()
    exact = problem.start.clone()
    wanted = problem.train(exact, build("adamw", {"w": exact}, learning_rate=1e-5, weight_decay=0.0), 150)
    assert wanted[-1] < 0.2

    plain = problem.start.to(torch.bfloat16)
    stuck = problem.train(plain, torch.optim.AdamW([plain], lr=1e-5, weight_decay=0.0), 150)
    assert stuck[-1] > 0.7  # weights near zero do move

    w = problem.start.to(KINDS[kind][2], copy=True)
    got = problem.train(w, build(kind, {"w": w}, learning_rate=1e-5, weight_decay=0.0), 150)
    assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) < 0.05  # of which bf16's own noise is 0.3%
    assert (w.float() - exact).mean().abs() < 2e-5  # no bias: four standard errors of rounding 150 times


def test_bf16_second_moment_follows_too() -> None:
    """beta2 = 0.999 changes it by a thousandth a step, a quarter of a bf16 step at the most; plain rounding would keep it for ever."""
    w = torch.zeros(20_000, dtype=torch.bfloat16)
    optimizer = build("bf16", {"w": w})
    for step in range(400):
        w.grad = torch.full_like(w, 1.0 if step < 200 else 0.25)
        optimizer.step()
    expected = 0.0
    for step in range(400):
        expected = 0.999 * expected + 0.001 * (1.0 if step < 200 else 0.0625)
    assert optimizer.state[w]["exp_avg_sq"].float().mean().item() == pytest.approx(expected, rel=2e-3)


def test_bf16_rounds_to_a_neighbour_right_on_average() -> None:
    exact = torch.full((200_000,), 0.0200012)
    low = (exact[0].view(torch.int32) & ~0xFFFF).view(torch.float32)
    high = low + 2.0**-13
    assert low < exact[0] < high
    out = torch.empty(200_000, dtype=torch.bfloat16)
    random = adam_bf16.random_bits(0, len(out), adam_bf16._keys("0/1/w"), torch.device("cpu"))
    adam_bf16._round_into(out, exact, (random >> 16) & 0xFFFF)
    assert set(out.float().unique().tolist()) == {low.item(), high.item()}
    assert out.double().mean().item() == pytest.approx(0.0200012, abs=4 * 2.0**-13 * 0.5 / 200_000**0.5)
    minus = torch.empty_like(out)
    adam_bf16._round_into(minus, -exact, (random >> 16) & 0xFFFF)
    assert torch.equal(minus, -out)


def test_random_bits_are_even_and_unlike_each_other() -> None:
    def bits(keys: tuple[int, int], first: int = 0) -> Tensor:
        drawn = adam_bf16.random_bits(first, 100_000, keys, torch.device("cpu"))
        return torch.stack([(drawn >> i) & 1 for i in range(32)]).double()

    one = bits(adam_bf16._keys("0/1/w"))
    assert (one.mean(1) - 0.5).abs().max() < 0.01
    for other in (bits(adam_bf16._keys("0/2/w")), bits(adam_bf16._keys("0/1/v")), one.roll(1, 1), one.roll(1, 0)):
        assert ((one == other).double().mean(1) - 0.5).abs().max() < 0.01
    assert torch.equal(bits(adam_bf16._keys("0/1/w"), first=700)[:, :-700], one[:, 700:])  # an element's bits are its own
    whole = adam_bf16.random_bits(2**32 - 5, 10, (3, 4), torch.device("cpu"))
    assert torch.equal(whole[5:], adam_bf16.random_bits(0, 5, (3, 4), torch.device("cpu")))  # element numbers wrap


def test_bf16_depends_on_seed_step_and_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(seed: int = 0, name: str = "w", chunk: int = 1000) -> Tensor:
        monkeypatch.setitem(adam_bf16.CHUNK, "cpu", chunk)
        masters = {name: weights(torch.bfloat16)["matrix"]}
        steps(build("bf16", masters, seed), masters, range(2))
        return masters[name]

    assert torch.equal(trained(), trained(chunk=2**20))
    assert not torch.equal(trained(), trained(seed=1))
    assert not torch.equal(trained(), trained(name="v"))


@pytest.fixture
def one_of_several() -> Iterator[Any]:
    """Begins to be worker `rank` of `size`, whose peers do not exist."""

    def begin(rank: int, size: int) -> Any:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        return init_device_mesh("cpu", (size,))

    yield begin
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["adamw", "bf16"])
def test_shards_are_the_rows_of_the_whole(kind: str, one_of_several: Any) -> None:
    dtype = KINDS[kind][2]
    whole = weights(dtype)
    steps(build(kind, whole), whole, range(3))
    for size, rank in ((2, 0), (2, 1), (4, 3)):
        mesh = one_of_several(rank, size)
        masters: dict[str, Tensor] = {n: zeros(s, dtype=dtype, device_mesh=mesh, placements=[Shard(0)]) for n, s in SHAPES.items()}
        for name, value in weights(dtype).items():
            shards.fill(masters[name], value, rank)
        optimizer = build(kind, masters)
        assert isinstance(optim.state(optimizer, masters)["matrix.exp_avg"], DTensor)
        for number in range(3):
            plain = {n: torch.empty(s, dtype=dtype) for n, s in SHAPES.items()}
            give_gradients(plain, number)
            for name, master in masters.items():
                grad = plain[name].grad
                assert grad is not None
                master.grad = zeros(SHAPES[name], dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
                shards.fill(master.grad, grad, rank)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + number)
            optimizer.step()
        for name, master in masters.items():
            mine = shards.part(master, rank)
            rows = slice(mine.offset[0], mine.offset[0] + mine.local.shape[0])
            assert torch.equal(mine.local, whole[name][rows]), (size, rank, name)


def test_what_cannot_be_had_together_is_refused(one_of_several: Any) -> None:
    eight = Optim.model_validate({"type": "adamw8bit", "learning_rate": 1e-3})
    with pytest.raises(SpecError, match=r"adamw8bit and `scale\.master` is bf16"):
        optim.build(weights(torch.bfloat16), eight, "bf16")
    with pytest.raises(SpecError, match="sharded"):
        optim.build({"w": zeros(8, 8, device_mesh=one_of_several(0, 2), placements=[Shard(0)])}, eight)
    with pytest.raises(SpecError, match=r"trained here is float32: adapters always are.*method\.type"):
        build("bf16", weights())


def test_schedules() -> None:
    def rates(**options: Any) -> list[float]:
        spec = Optim.model_validate({"learning_rate": 1.0, "warmup_ratio": 0.2, **options})
        return [optim.learning_rate(spec, step, 10) for step in range(10)]

    assert rates(schedule="constant") == [0.5] + [1.0] * 9
    assert rates(schedule="linear")[1:4] == [1.0, 1.0, 0.875]
    cosine = rates(schedule="cosine")
    assert cosine[2] == 1.0 and cosine[6] == pytest.approx(0.5) and 0 < cosine[9] < 0.05
    assert all(a >= b for a, b in itertools.pairwise(cosine[1:]))
    assert rates(schedule="linear", warmup_ratio=0.0)[0] == 1.0


def test_spikes() -> None:
    usual = [1.0] * 20
    assert optim.is_bad(float("nan"), usual, None) and optim.is_bad(float("inf"), usual, None)
    assert not optim.is_bad(1e9, usual, None)
    assert optim.is_bad(11.0, usual, 10.0) and not optim.is_bad(9.0, usual, 10.0)
    assert not optim.is_bad(11.0, usual[:5], 10.0)  # too few to tell
