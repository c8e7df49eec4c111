"""What is built for training: what is trained, in which precision, and what is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics import runs
from trainers import attention, model, resolve, train
from trainers.batching import Order
from trainers.checkpoint import Progress
from trainers.errors import ModelError, SpecError
from trainers.learner import Learner
from trainers.parallel import World
from trainers.records import RunDir
from trainers.spec import Placement
from trainers.store import TokenStore

BF16 = {"tokens_per_microbatch": 64, "precision": "bf16"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return TokenStore(runs.make_store(tmp_path_factory.mktemp("stores") / "learner"), "train")


def build(tiny: Path, **sections: Any) -> Learner:
    return Learner.build(resolve.schedule(runs.make_spec(**sections), 24, Placement()), tiny, World())


def test_one_line_says_what_is_trained(tiny: Path) -> None:
    assert build(tiny).line().startswith("4,096 of 32,288 parameters (12.69%): LoRA adapters of rank 4 on 14 layers (down_proj, gate_proj,")
    dora = build(tiny, method={"dora": True, "targets": ["q_proj"], "modules_to_save": ["norm"]}).line()
    assert "DoRA adapters of rank 4 on 2 layers (q_proj), and norm whole; fp32, masters in fp32" in dora
    assert (
        "(100.00%): all weights are trained; bf16, masters in bf16"
        in build(tiny, method={"type": "full"}, scale={**BF16, "master": "bf16"}).line()
    )


def test_masters_are_fp32_where_blocks_compute_in_bf16(tiny: Path, store: TokenStore) -> None:
    learner = build(tiny, method={"type": "full"}, scale=BF16)
    assert {p.dtype for p in learner.parameters.values()} == {torch.bfloat16}
    assert {m.dtype for m in learner.masters.values()} == {torch.float32}
    train.train_step(learner, store, np.arange(5), Progress(), 1e-5)
    for name, master in learner.masters.items():
        assert torch.equal(learner.parameters[name], master.to(torch.bfloat16)), name
        assert learner.parameters[name].grad is None  # added to its master's and freed
    moved = [n for n, m in learner.masters.items() if not torch.equal(m, m.to(torch.bfloat16).float())]
    assert moved  # updates smaller than bf16 can tell are kept


def test_gradients_add_up_in_fp32(tiny: Path, store: TokenStore) -> None:
    """Twenty micro-batches in bf16: their sum is that of their gradients, not of rounded sums."""
    learner = build(tiny, method={"type": "full"}, scale={**BF16, "tokens_per_microbatch": 16})
    learner.zero()
    each = []
    for i in range(20):
        learner.zero()
        train._forward(learner, store, np.array([i]), 0)
        each.append([g.clone() for g in learner.gradients()])
    learner.zero()
    for i in range(20):
        train._forward(learner, store, np.array([i]), 0)
    for got, *parts in zip(learner.gradients(), *each, strict=True):
        want = torch.stack(parts).double().sum(0)
        assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"targets": ["q_prj"]}, "names `q_prj`"),
        ({"modules_to_save": ["nrm"]}, "names `nrm`"),
        ({"modules_to_save": ["lm_head"]}, "embedding and head are one matrix"),
        ({"modules_to_save": ["mlp"]}, "which has an adapter"),
    ],
)
def test_a_module_that_cannot_be_trained_is_named(tiny: Path, method: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build(tiny, method=method)


def test_rows_that_leak_are_found_before_the_first_step(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = build(tiny)
    learner.probe()

    def leaking(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Any, scale: float) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    monkeypatch.setattr(attention, "_on_cpu", leaking)  # what a mask that is ignored does
    with pytest.raises(ModelError, match="Packed examples see each other"):
        learner.probe()


def test_a_model_that_gives_no_numbers_is_refused(tiny: Path) -> None:
    learner = build(tiny)
    with torch.no_grad():
        next(learner.trainee.model.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError):
        learner.probe()


@pytest.mark.filterwarnings("ignore")  # dynamo warns of what it does itself while it traces
def test_compiled_blocks_are_few_graphs_and_change_nothing(tiny: Path, store: TokenStore) -> None:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    plain, compiled = (build(tiny) for _ in range(2))
    compiled.compile(backend="aot_eager")
    compiled.probe()
    made: list[int] = []
    for step in range(4):
        chosen = np.arange(step, step + 5)
        one, other = (train.train_step(learner, store, chosen, Progress(step=step), 0.01) for learner in (plain, compiled))
        assert other.measured.loss == pytest.approx(one.measured.loss, rel=1e-5)
        assert other.norm == pytest.approx(one.norm, rel=1e-4)
        made.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert made[0] == made[-1] <= 20  # none for another length; on a CPU attention breaks each pass in two
    dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # dynamo warns of what it does itself while it traces
def test_what_cannot_be_compiled_runs_as_it_is_and_says_why(tiny: Path, store: TokenStore, tmp_path: Path) -> None:
    learner = build(tiny, scale={"compile": True})

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler is installed here")

    learner.compile = lambda: Learner.compile(learner, backend=broken)  # type: ignore[method-assign, assignment]
    run = RunDir(tmp_path, 1, "train")
    train.make_ready(learner, run)
    [event] = [e for _, events in run.events() for e in events]
    assert event.level == "warn" and event.message.startswith("Blocks run uncompiled: torch.compile failed (")
    assert "no compiler is installed here" in event.message
    train.train_step(learner, store, np.arange(5), Progress(), 0.01)


def test_the_same_examples_at_any_number_of_workers() -> None:
    """`Order` knows no ranks; `batching.plan` deals out each step's examples, all of them, once."""
    from trainers import batching

    order = Order("key", 24, 2, 5, 0)
    lengths = np.random.default_rng(0).integers(2, 40, 24)
    for step in range(order.num_steps):
        chosen = order.step(step)
        for ranks in (1, 2, 4):
            plan = batching.plan(lengths[chosen].tolist(), ranks, 64)
            assert sorted(i for rank in plan for pack in rank for i in pack) == list(range(len(chosen)))


def test_a_sample_is_what_transformers_generates(tiny: Path) -> None:
    trainee = build(tiny).trainee
    reference: Any = model.load(tiny, torch.float32, attn="sdpa")
    prompt = np.arange(5, 17)
    got = model.greedy(trainee, prompt, 12, frozenset(), "cpu")
    want = reference.generate(
        torch.from_numpy(prompt)[None], attention_mask=torch.ones(1, 12), max_new_tokens=12, do_sample=False, eos_token_id=-1
    )
    assert got == want[0, 12:].tolist()
    stop = frozenset(got[2:3])
    assert model.greedy(trainee, prompt, 12, stop, "cpu") == got[: got.index(got[2]) + 1]
