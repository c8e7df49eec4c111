"""The merged folder is what was trained: PEFT's own layers are the reference, for every kind of adapter and of base."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainers import tuned
from trainers import agreement, merge
from trainers.checkpoint import Checkpointer, Progress
from trainers.errors import ModelError, TuneyardError, Unavailable
from trainers.fold import AdapterFold, FullFold
from trainers.parallel import World
from trainers.records import CheckpointRecord, ModelRecord, RunDir
from trainers.tensors import ModelFolder

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "some layers": {"target_modules": ["q_proj", "down_proj"]},
    "norm whole": {"modules_to_save": ["norm"]},
    "dora, head whole": {"use_dora": True, "modules_to_save": ["lm_head"]},
    "embedding whole": {"modules_to_save": ["embed_tokens"]},
    "embedding and head tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_is_base_and_adapter(tiny: Path, tmp_path: Path, kind: str) -> None:
    run = tuned.a_run(tmp_path / "run", tiny, **ADAPTERS[kind])
    record = merge.merge(run, tuned.job(), "tiny", tiny, 10, tuned.PROMPTS)
    want = tuned.reference(tiny, run.path(str(record.adapter)))
    got = tuned.logits(tuned.load(run.path("model")))
    assert (got - want).abs().max() < 2e-4 * want.abs().max()
    assert record.kl is not None and record.effect is not None and record.kl < 1e-6 < 1e-3 < record.effect
    assert not list(run.root.glob(".*"))  # nothing temporary is left


@pytest.mark.parametrize("modules", [[], ["lm_head"]])
def test_a_base_in_bf16_shards_with_a_head_of_its_own(tiny: Path, tmp_path: Path, modules: list[str]) -> None:
    base = tuned.resaved(tiny, tmp_path / "base", tied=False, dtype=torch.bfloat16, shard="20KB")
    run = tuned.a_run(tmp_path / "run", base, modules_to_save=modules or None)
    record = merge.merge(run, tuned.job(), "b", base, 10, tuned.PROMPTS)
    before, after = ModelFolder(base), ModelFolder(run.path("model"))
    assert len(after.files) > 3 and [f.path.name for f in before.files] == [f.path.name for f in after.files]
    assert before.names() == after.names() and all(before[n] == after[n] for n in before.names())  # dtypes, shapes and places
    assert record.kl is not None and record.effect is not None and record.kl < 0.01 * record.effect


def test_a_head_that_was_tied_in_shards_is_named_in_the_index(tiny: Path, tmp_path: Path) -> None:
    base = tuned.resaved(tiny, tmp_path / "base", shard="20KB")
    run = tuned.a_run(tmp_path / "run", base, modules_to_save=["lm_head"])
    merge.merge(run, tuned.job(), "b", base, 10, tuned.PROMPTS)
    assert "lm_head.weight" in json.loads(run.path("model", "model.safetensors.index.json").read_text())["weight_map"]
    want = tuned.reference(base, run.path("adapters", "step-000010"))
    assert (tuned.logits(tuned.load(run.path("model"))) - want).abs().max() < 2e-4 * want.abs().max()


@pytest.mark.parametrize("double_quant", [True, False])
def test_qlora_is_merged_into_what_four_bits_leave(tiny: Path, tmp_path: Path, double_quant: bool) -> None:
    run = tuned.a_run(tmp_path / "run", tiny)
    spec = tuned.job(method={"type": "qlora", "double_quant": double_quant}, scale={"precision": "bf16"})
    record = merge.merge(run, spec, "tiny", tiny, 10, tuned.PROMPTS)
    assert record.served == "merged" and "NF4" in merge.told(spec, record)
    assert record.kl is not None and record.effect is not None and record.kl < 1e-6 < 1e-3 < record.effect
    # Against the base as it was, it is visibly another model: the check would tell the two apart.
    plain = tuned.reference(tiny, run.path("adapters", "step-000010"))
    got = tuned.logits(tuned.load(run.path("model")))
    assert (got - plain).abs().max() > 0.05


def test_full_weights_in_the_bases_files(tiny: Path, tmp_path: Path) -> None:
    """Any source of `model.{name}` tensors; the checkpoint's own is tested in tests/numerics."""
    base = tuned.resaved(tiny, tmp_path / "base", dtype=torch.bfloat16, shard="20KB")
    trained = {f"model.{n}": t.float() + 0.01 * torch.randn(t.shape) for f in base.glob("*.safetensors") for n, t in load_file(f).items()}
    fold = FullFold(list(trained), trained.__getitem__)
    (out := tmp_path / "out").mkdir()
    merge.write_model(base, fold, out)
    after = ModelFolder(out)
    assert after.names() == ModelFolder(base).names() and "lm_head.weight" not in after
    for name in after.names():
        assert after.read(name).equal(trained[f"model.{name}"].bfloat16())
    got = agreement.of_weights(out, agreement.reader(after), tuned.PROMPTS)
    want = agreement.of_weights(base, fold.read, tuned.PROMPTS)
    assert 0 < (got - want).abs().max() < 0.2

    lacking = FullFold([n for n in trained if "norm" not in n], trained.__getitem__)
    with pytest.raises(ModelError, match="lacks"):
        merge.write_model(base, lacking, out)
    strange = FullFold([*trained, "model.adapter.weight"], trained.__getitem__)
    with pytest.raises(ModelError, match=r"adapter\.weight, which the base does not have"):
        merge.write_model(base, strange, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_full_merge_from_a_checkpoint(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    base = tuned.resaved(tiny, tmp_path / "base", dtype=torch.bfloat16)
    before = ModelFolder(base)
    torch.manual_seed(0)
    trained = {n: (before.read(n).float() + 0.02 * torch.randn(before[n].shape)).to(dtype) for n in before.names()}
    run, part = RunDir(tmp_path / "run", 1, "driver"), tuned.job().checkpoint
    saver = Checkpointer(run, World(), part)
    record = CheckpointRecord(step=10, files={}, train_loss=1.0, train_accuracy=0.5)
    state = {f"model.{n}": t for n, t in trained.items()} | {f"optimizer.{n}.exp_avg": t * 0 for n, t in trained.items()}
    saver.begin(state, Progress(step=10), record, None)
    saver.wait_copied()
    saver.finish()
    spec = tuned.job(method={"type": "full"})
    made = merge.merge(run, spec, "tiny", base, 10, tuned.PROMPTS)
    assert made.adapter is None and made.served == "merged" and "from the checkpoint's weights" in merge.told(spec, made)
    after = ModelFolder(run.path("model"))
    assert all(after.read(n).equal(trained[n].bfloat16()) for n in before.names())
    assert made.kl is not None and made.effect is not None and made.kl < 1e-4 < 0.01 < made.effect
    assert "full fine-tuning" not in run.path("model", "README.md").read_text()  # no resolved.json lies here
    with pytest.raises(TuneyardError, match="step 11"):
        merge.merge(run, spec, "tiny", base, 11, tuned.PROMPTS)


def test_a_streamed_model_gives_transformers_logits(tiny: Path, smollm: Path) -> None:
    got = agreement.of_weights(tiny, agreement.reader(ModelFolder(tiny)), tuned.PROMPTS)
    assert (got - tuned.logits(tuned.load(tiny))).abs().max() < 1e-4
    got = agreement.of_weights(smollm, agreement.reader(ModelFolder(smollm)), tuned.PROMPTS)
    assert (got - tuned.logits(tuned.load(smollm))).abs().max() < 1e-3


def test_a_wrong_merge_is_refused_with_its_distance(tiny: Path, tmp_path: Path) -> None:
    run = tuned.a_run(tmp_path / "run", tiny)
    config = run.path("adapters", "step-000010", "adapter_config.json")
    base, adapter = ModelFolder(tiny), config.parent
    want, plain = agreement.of_adapter(tiny, adapter, agreement.reader(base), tuned.PROMPTS)
    assert (want - tuned.reference(tiny, adapter)).abs().max() < 1e-3 and (plain - tuned.logits(tuned.load(tiny))).abs().max() < 1e-3
    with pytest.raises(ModelError, match=r"KL .* nats, where .* is allowed"):  # the base itself is no merged model
        agreement.compare(plain, want, plain)
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "lora_alpha": 9}))  # the scale a little wrong
    (tmp_path / "wrong").mkdir()
    merge.write_model(tiny, AdapterFold(adapter, base), tmp_path / "wrong")
    got = agreement.of_weights(tmp_path / "wrong", agreement.reader(ModelFolder(tmp_path / "wrong")), tuned.PROMPTS)
    with pytest.raises(ModelError, match="does not agree"):
        agreement.compare(got, want, plain)
    with pytest.raises(ModelError, match="does not agree"):
        agreement.compare(got * float("nan"), want, plain)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_rounds_to_the_same_weights(tiny: Path, tmp_path: Path, kind: str) -> None:
    base = tuned.resaved(tiny, tmp_path / "base", dtype=torch.bfloat16)
    run = tuned.a_run(tmp_path / "run", base, **ADAPTERS[kind])
    merge.merge(run, tuned.job(), "b", base, 10, tuned.PROMPTS)
    adapter, read = run.path("adapters", "step-000010"), agreement.reader(ModelFolder(base))
    want, _ = agreement.of_adapter(base, adapter, read, tuned.PROMPTS)
    rounded = agreement.of_rounded(base, adapter, read, tuned.PROMPTS, torch.bfloat16)
    got = agreement.of_weights(run.path("model"), agreement.reader(ModelFolder(run.path("model"))), tuned.PROMPTS)
    assert (got - rounded).abs().max() < 0.1 * (got - want).abs().max()


def test_what_rounding_takes_after_little_training_is_told_and_nothing_else_passes(tiny: Path, tmp_path: Path) -> None:
    base = tuned.resaved(tiny, tmp_path / "base", dtype=torch.bfloat16)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 200  # so that small changes show in its logits
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    run = RunDir(tmp_path / "run", 1, "driver")
    folder = run.path("adapters", "step-000010")
    tuned.adapter(base, folder, scale=0.0, init_lora_weights=False)
    little = load_file(folder / "adapter_model.safetensors")
    for name, tensor in little.items():  # most changes of a weight are smaller than a bf16 step
        if "lora_B" in name:
            tensor.mul_(0.005)
    save_file(little, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    record = merge.merge(run, tuned.job(), "b", base, 10, tuned.PROMPTS)
    assert record.kl is not None and record.effect is not None and record.kl > agreement.allowed(record.effect)
    assert "rounding took that much" in merge.told(tuned.job(), record)

    read = agreement.reader(ModelFolder(base))
    want, plain = agreement.of_adapter(base, folder, read, tuned.PROMPTS)
    rounded = agreement.of_rounded(base, folder, read, tuned.PROMPTS, torch.bfloat16)
    got = agreement.of_weights(run.path("model"), agreement.reader(ModelFolder(run.path("model"))), tuned.PROMPTS)
    assert (got - rounded).abs().max() < 0.2 * (got - want).abs().max()
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 12}))  # half as much again
    (tmp_path / "wrong").mkdir()
    merge.write_model(base, AdapterFold(folder, ModelFolder(base)), tmp_path / "wrong")
    got = agreement.of_weights(tmp_path / "wrong", agreement.reader(ModelFolder(tmp_path / "wrong")), tuned.PROMPTS)
    with pytest.raises(ModelError, match="does not agree"):
        agreement.compare(got, want, plain, lambda: rounded)


def test_an_adapter_of_another_base_or_kind_is_refused(tiny: Path, tmp_path: Path) -> None:
    adapter = tuned.adapter(tiny, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    base = ModelFolder(tiny)
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**weights, name: torch.zeros(4, 33)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="q_proj is 32 by 33, not 32 by 32"):
        merge.write_model(tiny, AdapterFold(adapter, base), tmp_path / "out")
    save_file({**weights, name.replace("layers.0", "layers.7"): torch.zeros(4, 32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.7.*which the base does not have"):
        merge.write_model(tiny, AdapterFold(adapter, base), tmp_path / "out")
    told = json.loads((adapter / "adapter_config.json").read_text())
    for change in ({"peft_type": "IA3"}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}}):
        (adapter / "adapter_config.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(ModelError, match="cannot be merged here"):
            AdapterFold(adapter, base)


def test_a_damaged_base_is_named(tiny: Path, tmp_path: Path) -> None:
    base = tuned.resaved(tiny, tmp_path / "base", shard="20KB")
    last = sorted(base.glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="cut short"):
        ModelFolder(base)
    last.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="no safetensors file"):
        ModelFolder(base)
    last.unlink()
    with pytest.raises(ModelError, match=r"lacks model-.*which its index names"):
        ModelFolder(base)


def test_no_room_is_told_before_anything_is_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tuned.a_run(tmp_path / "run", tiny)
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Unavailable, match=r"needs .* GB"):
        merge.merge(run, tuned.job(), "tiny", tiny, 10, tuned.PROMPTS)
    assert not run.path("model").exists() and not list(run.root.glob(".*"))


def test_what_is_made_and_when(tiny: Path, tmp_path: Path) -> None:
    run = tuned.a_run(tmp_path / "run", tiny)
    bare = merge.merge(run, tuned.job(export={"merge": False}), "tiny", tiny, 10, tuned.PROMPTS)
    assert bare.merged is None and bare.served == "adapter" and not run.path("model").exists()
    made = merge.merge(run, tuned.job(), "tiny", tiny, 10, tuned.PROMPTS)  # asked for after all
    assert made.merged == "model" and run.read("model.json", ModelRecord) == made
    stamp = run.path("model", "model.safetensors").stat().st_mtime_ns
    assert merge.merge(run, tuned.job(), "tiny", tiny, 10, []) == made  # done is done
    assert run.path("model", "model.safetensors").stat().st_mtime_ns == stamp

    without = {"export": {"merge": False}}
    for method in ({"type": "full"}, {"type": "qlora"}, {"dora": True}, {"modules_to_save": ["norm"]}):
        assert merge.wants_whole(tuned.job(method=method, **without)) and merge.served(tuned.job(method=method).method) == "merged"
        assert not merge.wants_whole(tuned.job(method=method, deploy={"serve": False}, **without))
    assert merge.wants_whole(tuned.job(export={"merge": False, "formats": ["gguf-f16"]}))


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


KILLED = """
import sys
from pathlib import Path
from tests.trainers import tuned
from trainers import merge
from trainers.records import RunDir
base, run = Path(sys.argv[1]), RunDir(sys.argv[2], int(sys.argv[3]), "driver")
print("ready", flush=True)
merge.merge(run, tuned.job(), "big", base, 10, tuned.PROMPTS, lambda done, total: print(f"{done / total:.3f}", flush=True))
print("done", flush=True)
"""


def test_killed_in_the_middle_and_made_again(tiny: Path, tmp_path: Path) -> None:
    base = tuned.resaved(tiny, tmp_path / "base", shard="20KB")
    whole, killed = (tuned.a_run(tmp_path / name / "run", base) for name in ("whole", "killed"))
    merge.merge(whole, tuned.job(), "big", base, 10, tuned.PROMPTS)
    worker = subprocess.Popen([sys.executable, "-c", KILLED, str(base), str(killed.root), "1"], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    for line in worker.stdout:
        if line[0] == "0" and float(line) > 0.4:
            os.kill(worker.pid, signal.SIGKILL)
            break
    worker.stdout.close()
    assert worker.wait() == -signal.SIGKILL
    assert not killed.path("model").exists() and list(killed.root.glob(".model-*"))  # half of it lies there
    again = RunDir(killed.root, 2, "driver")
    merge.merge(again, tuned.job(), "big", base, 10, tuned.PROMPTS)
    assert digests(killed.path("model")) == digests(whole.path("model"))
    assert not list(killed.root.glob(".model-*"))


WRITES = """
import json, sys
from pathlib import Path
import torch
from trainers import merge
from trainers.fold import AdapterFold
from trainers.tensors import ModelFolder

base, adapter, out = map(Path, sys.argv[1:])

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)  # what the first product of a process loads is not the model's
seen = [resident()]
merge.write_model(base, AdapterFold(adapter, ModelFolder(base)), out, on_progress=lambda *_: seen.append(resident()))
print(json.dumps([max(seen) - seen[0], len(seen) - 1]))
"""


def test_memory_is_one_tensor_whatever_the_model(tmp_path: Path) -> None:
    """A base of 160 MB in one file, of tensors of 8 MB. In a process of its own, whose allocator gives back at once what is freed."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    for folder in (base, adapter, out):
        folder.mkdir()
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((1024, 2048), float(i)) for i in range(20)}
    save_file(weights, base / "model.safetensors")
    lora = [f"base_model.model.{n.removesuffix('.weight')}" for n in weights]
    tensors = {f"{n}.lora_A.weight": torch.ones(2, 2048) for n in lora} | {f"{n}.lora_B.weight": torch.ones(1024, 2) for n in lora}
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}
    told = subprocess.run(
        [sys.executable, "-c", WRITES, str(base), str(adapter), str(out)], env=env, capture_output=True, text=True, check=True
    )
    peak, looks = json.loads(told.stdout)
    assert looks == 20
    assert peak < 40e6, f"{peak / 1e6:.1f} MB"
    assert load_file(out / "model.safetensors")["model.layers.3.mlp.up_proj.weight"].eq(5).all()
