"""Whole runs: the same result whatever the number of workers, and whatever interrupts them."""

from __future__ import annotations

import hashlib
import itertools
import math
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.numerics import runs
from trainers import checkpoint, merge, optim
from trainers.records import RunDir
from trainers.spec import JobSpec
from trainers.store import TokenStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_store(tmp_path_factory.mktemp("stores") / "numerics")


@pytest.fixture(scope="module")
def uninterrupted(tiny: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert runs.run_training(tiny, store, folder, runs.make_spec()).status == "finished"
    return folder


def shard_of(folder: Path) -> Path:
    [file] = folder.glob("*.safetensors")
    return file


def final_state(folder: Path) -> Path:
    return shard_of(checkpoint.folders(RunDir(folder))[-1])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_runs_are_bit_identical(tiny: Path, store: Path, uninterrupted: Path, tmp_path: Path) -> None:
    runs.run_training(tiny, store, tmp_path, runs.make_spec())
    assert digest(final_state(tmp_path)) == digest(final_state(uninterrupted))


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_stopped_and_resumed_is_bit_identical(tiny: Path, store: Path, uninterrupted: Path, tmp_path: Path, stop_after: int) -> None:
    asked = itertools.count(1)
    first = runs.run_training(tiny, store, tmp_path, runs.make_spec(), should_stop=lambda: next(asked) == stop_after)
    assert (first.status, first.step) == ("stopped", stop_after)
    assert runs.run_training(tiny, store, tmp_path, runs.make_spec(), attempt=2).status == "finished"
    assert digest(final_state(tmp_path)) == digest(final_state(uninterrupted))
    losses = [s.train_loss for s in RunDir(tmp_path).steps()]
    assert losses == [s.train_loss for s in RunDir(uninterrupted).steps()]


BF16 = {"tokens_per_microbatch": 64, "precision": "bf16"}
VARIANTS = {
    "dora with noise": runs.make_spec(method={"dora": True, "dropout": 0.1}, optim={"neftune_alpha": 5.0}),
    "full, fp32": runs.make_spec(method={"type": "full"}),
    "full, bf16 with fp32 masters": runs.make_spec(method={"type": "full"}, scale=BF16),
    "full, bf16 alone": runs.make_spec(method={"type": "full"}, scale={**BF16, "master": "bf16"}),
    "full, 8-bit AdamW": runs.make_spec(method={"type": "full"}, optim={"type": "adamw8bit"}),
    "qlora": runs.make_spec(method={"type": "qlora"}, scale=BF16),
    "lora, recomputed": runs.make_spec(scale={"activation_checkpointing": "full"}),
}


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_method_resumes_bit_for_bit(tiny: Path, store: Path, tmp_path: Path, spec: JobSpec) -> None:
    assert runs.run_training(tiny, store, tmp_path / "whole", spec).status == "finished"
    asked = itertools.count(1)
    assert runs.run_training(tiny, store, tmp_path / "twice", spec, should_stop=lambda: next(asked) == 6).step == 6
    assert runs.run_training(tiny, store, tmp_path / "twice", spec, attempt=2).status == "finished"
    assert digest(final_state(tmp_path / "twice")) == digest(final_state(tmp_path / "whole"))
    losses = [s.train_loss for s in RunDir(tmp_path / "whole").steps()]
    assert losses == [s.train_loss for s in RunDir(tmp_path / "twice").steps()]
    assert losses[-1] < losses[0] + 0.5 and len(set(losses)) == len(losses)


def test_recomputed_blocks_change_nothing(tiny: Path, store: Path, uninterrupted: Path, tmp_path: Path) -> None:
    for mode in ("selective", "full"):
        runs.run_training(tiny, store, tmp_path / mode, runs.make_spec(scale={"activation_checkpointing": mode}))
        assert digest(final_state(tmp_path / mode)) == digest(final_state(uninterrupted))


def test_killed_and_resumed_is_bit_identical(tiny: Path, store: Path, uninterrupted: Path, tmp_path: Path) -> None:
    [process] = runs.spawn(tiny, store, tmp_path, {"run": runs.make_spec()})
    deadline = time.monotonic() + 300
    while not checkpoint.folders(RunDir(tmp_path / "run")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "finished" in runs.finish(runs.spawn(tiny, store, tmp_path, {"run": runs.make_spec()}, attempt=2))
    assert digest(final_state(tmp_path / "run")) == digest(final_state(uninterrupted))


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "garbled manifest", "missing file"])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tiny: Path, store: Path, uninterrupted: Path, tmp_path: Path, damage: str
) -> None:
    asked = itertools.count(1)
    runs.run_training(tiny, store, tmp_path, runs.make_spec(), should_stop=lambda: next(asked) == 7)
    newest = checkpoint.folders(RunDir(tmp_path))[-1]
    state = shard_of(newest)
    if damage == "truncate":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "flip":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "no manifest":
        (newest / "MANIFEST.json").unlink()
    elif damage == "garbled manifest":
        (newest / "MANIFEST.json").write_text("{")
    else:
        (newest / "progress.json").unlink()
    assert runs.run_training(tiny, store, tmp_path, runs.make_spec(), attempt=2).status == "finished"
    assert digest(final_state(tmp_path)) == digest(final_state(uninterrupted))
    messages = [e.message for _, events in RunDir(tmp_path).events() for e in events]
    assert any("resumes after step 4" in m for m in messages), messages
    assert damage == "no manifest" or any("is damaged" in m for m in messages)


def test_checkpoints_are_pruned_but_best_and_adapters_stay(tiny: Path, store: Path, tmp_path: Path) -> None:
    spec = runs.make_spec(checkpoint={"every_steps": 1, "keep_last": 2}, validate={"every_steps": 1})
    record = runs.run_training(tiny, store, tmp_path, spec)
    kept = {checkpoint.read_manifest(f, verify=True).step for f in checkpoint.folders(RunDir(tmp_path))}
    by_loss = min(RunDir(tmp_path).steps(), key=lambda s: (s.valid_loss, -s.step))
    assert record.best_step == by_loss.step
    assert kept == {record.num_steps, record.num_steps - 1, by_loss.step}
    assert len(list((tmp_path / "adapters").iterdir())) == record.num_steps


def test_validation_is_told_by_slice_and_sums_up(tiny: Path, tmp_path: Path) -> None:
    store = runs.make_store(tmp_path / "stores" / "k", validation_examples=7, slices=("a", "b", None))
    runs.run_training(tiny, store, tmp_path / "run", runs.make_spec())
    plain = runs.make_store(tmp_path / "stores" / "p", validation_examples=7)
    runs.run_training(tiny, plain, tmp_path / "plain", runs.make_spec())
    (mine, *_), (whole, *_) = ([s for s in RunDir(tmp_path / name).steps() if s.valid_loss is not None] for name in ("run", "plain"))
    assert set(mine.valid_slices) == {"a", "b"} and whole.valid_slices == {}
    held_out = TokenStore(store, "validation")
    for name, told in mine.valid_slices.items():
        assert told["supervised_tokens"] == sum(int(held_out.supervised[i]) for i in range(7) if held_out.slice(i) == name)
    assert mine.valid_loss is not None and min(t["loss"] for t in mine.valid_slices.values()) > 0


def test_training_ends_early_and_a_resumed_run_ends_where_it_would_have(tiny: Path, store: Path, tmp_path: Path) -> None:
    rule = {"every_steps": 1, "early_stopping": {"patience": 2, "min_delta": 10.0}}  # no loss can be that much better
    spec = runs.make_spec(validate=rule, checkpoint={"every_steps": 1})
    record = runs.run_training(tiny, store, tmp_path / "whole", spec)
    assert (record.status, record.step) == ("finished", 3) and record.num_steps == 10
    messages = [e.message for _, events in RunDir(tmp_path / "whole").events() for e in events]
    assert any(m.startswith("Training ends early: 2 validations in a row") for m in messages)

    asked = itertools.count(1)
    first = runs.run_training(tiny, store, tmp_path / "twice", spec, should_stop=lambda: next(asked) == 2)
    assert (first.status, first.step) == ("stopped", 2)
    for attempt in (2, 3):  # the third finds that enough was done
        again = runs.run_training(tiny, store, tmp_path / "twice", spec, attempt=attempt)
        assert (again.status, again.step, again.best_step) == ("finished", 3, record.best_step)
    assert digest(final_state(tmp_path / "twice")) == digest(final_state(tmp_path / "whole"))


@pytest.fixture
def poisoned(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with a token (7) whose embedding is not a number, so that a step with it in it has no gradient."""
    import json
    import shutil

    from safetensors.torch import save_file

    folder = tmp_path / "poisoned"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][7] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return folder


def make_tokens(folder: Path, poison: set[int]) -> Path:
    """24 examples without token 7, but for those numbered in `poison`; no validation."""
    import numpy as np

    from trainers.store import StoreWriter, to_table

    draw = np.random.default_rng(0)
    ids = [draw.integers(8, 300, 12).astype(np.int32) for _ in range(24)]
    for i in poison:
        ids[i][3] = 7
    writer = StoreWriter(folder)
    writer.append("train", to_table(ids, [[(5, 12)]] * 24, [f"a:{i}" for i in range(24)], [None] * 24))
    writer.commit("{}")
    return folder


def test_a_step_without_a_gradient_is_skipped_and_told(poisoned: Path, tmp_path: Path) -> None:
    store = make_tokens(tmp_path / "stores" / "one", {5})
    record = runs.run_training(poisoned, store, tmp_path / "run", runs.make_spec())
    assert record.status == "finished"
    steps = RunDir(tmp_path / "run").steps()
    skipped = [s.step for s in steps if s.skipped]
    assert len(skipped) == 2  # the example comes once in each epoch
    assert all(math.isfinite(s.train_loss) and math.isfinite(s.grad_norm) for s in steps)  # records are JSON
    messages = [e.message for _, events in RunDir(tmp_path / "run").events() for e in events]
    assert [m for m in messages if "is skipped: the gradient is not finite" in m] == [m for m in messages if "is skipped" in m]
    assert all(torch.isfinite(t).all() for t in load_file(final_state(tmp_path / "run")).values())

    asked = itertools.count(1)
    runs.run_training(poisoned, store, tmp_path / "twice", runs.make_spec(), should_stop=lambda: next(asked) == skipped[0])
    runs.run_training(poisoned, store, tmp_path / "twice", runs.make_spec(), attempt=2)
    assert digest(final_state(tmp_path / "twice")) == digest(final_state(tmp_path / "run"))


def test_too_many_steps_without_a_gradient_end_the_run(poisoned: Path, tmp_path: Path) -> None:
    store = make_tokens(tmp_path / "stores" / "all", set(range(24)))
    record = runs.run_training(poisoned, store, tmp_path / "run", runs.make_spec(optim={"max_skipped": 2}))
    assert record.status == "failed" and record.error is not None
    assert "Step 3: the gradient is not finite" in record.error["message"] and "learning_rate" in record.error["message"]


def test_a_spike_is_skipped_where_that_is_asked_for() -> None:
    calm = [1.0, 1.1, 0.9] * 5
    assert not optim.is_bad(50.0, calm, None) and optim.is_bad(50.0, calm, 10.0) and not optim.is_bad(9.0, calm, 10.0)
    assert not optim.is_bad(50.0, calm[:9], 10.0)  # too few to judge by
    assert optim.is_bad(float("inf"), [], None) and optim.is_bad(float("nan"), calm, 10.0)


def test_merged_equals_base_plus_adapter(tiny: Path, uninterrupted: Path) -> None:
    run = RunDir(uninterrupted, 1, "driver")
    record = merge.merge(run, runs.make_spec(), "tiny", tiny, step=10, prompts=[[5, 6, 7, 8], [9, 10]])
    assert record.merged is not None
    assert record.kl is not None and record.effect is not None and record.max_logit_difference is not None
    assert record.kl < 1e-6  # fp32 cannot tell less
    assert record.effect > 1e-3
    assert record.max_logit_difference < 1e-4  # fp32 base: nothing but summation order is left
    assert merge.merge(run, runs.make_spec(), "tiny", tiny, step=10, prompts=[]) == record  # done is done


def test_a_rank_stabilised_adapter_is_what_peft_makes_of_it(tiny: Path, store: Path, tmp_path: Path) -> None:
    """Training, export and merge agree on the scale: PEFT's own layers are the reference."""
    from peft import PeftModel

    from trainers import lora, model
    from trainers.spec import Lora

    runs.run_training(tiny, store, tmp_path, runs.make_spec(method={"rslora": True}))
    run = RunDir(tmp_path, 1, "driver")
    record = merge.merge(run, runs.make_spec(), "tiny", tiny, step=10, prompts=[[5, 6, 7, 8], [9, 10]])
    assert record.kl is not None and record.effect is not None and record.kl < 1e-6 and record.effect > 1e-3
    peer = PeftModel.from_pretrained(model.load(tiny, torch.float32, attn="sdpa"), run.path("adapters", "step-000010"))
    ids = torch.tensor([[5, 6, 7, 8]])
    mine = model.load(tiny, torch.float32, attn="sdpa")
    lora.apply(mine, Lora(r=4, alpha=8, rslora=True))
    saved = load_file(run.path("adapters", "step-000010", "adapter_model.safetensors"))
    with torch.no_grad():
        for name, module in mine.named_modules():
            if isinstance(module, lora.LoraLinear):
                module.lora_A.copy_(saved[f"base_model.model.{name}.lora_A.weight"])
                module.lora_B.copy_(saved[f"base_model.model.{name}.lora_B.weight"])
        assert torch.allclose(mine(ids).logits, peer(ids).logits, atol=1e-5)
