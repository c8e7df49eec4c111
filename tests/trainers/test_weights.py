"""A base's weights arrive as they are in its files, or the folder is refused with what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_tiny
from tests.numerics import runs
from trainers import model, resolve
from trainers.errors import ModelError
from trainers.learner import Learner
from trainers.parallel import World
from trainers.spec import JobSpec, Placement

ROOT = Path(__file__).parents[2]


def build(folder: Path, **sections: dict) -> Learner:
    spec: JobSpec = resolve.schedule(runs.make_spec(**sections), 24, Placement())
    return Learner.build(spec, folder, World())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_loaded_model_gives_the_logits_of_transformers(tmp_path: Path, tied: bool, method: str) -> None:
    """Rotary frequencies, which no file holds, and the tied head included."""
    folder = make_tiny(tmp_path / "model", tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    trainee = build(folder, method={"type": method}).trainee
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        want = model.load(folder, torch.float32, attn="sdpa")(ids).logits[0, -1]
        got = model.greedy(trainee, ids[0].numpy(), 1, frozenset(), "cpu")
        logits = trainee(model.Continue(ids, model.DynamicCache(config=trainee.model.config)))
    assert torch.allclose(logits, want, atol=1e-4) and got == [int(want.argmax())]


def test_shards_are_read_by_their_index(tmp_path: Path, tiny: Path) -> None:
    split = Path(shutil.copytree(tiny, tmp_path / "split"))
    tensors = load_file(split / "model.safetensors")
    (split / "model.safetensors").unlink()
    names = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({n: tensors[n] for n in tensors if names[n] == file}, split / file, metadata={"format": "pt"})
    (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    whole, parts = build(tiny, method={"type": "full"}), build(split, method={"type": "full"})
    assert all(torch.equal(whole.masters[n], parts.masters[n]) for n in whole.masters)
    (split / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"split lacks model-00002-of-00002\.safetensors"):
        build(split)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def stored(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


NORM = "model.norm.weight"
BROKEN = [
    ("code of its own", edit(lambda c: c.update(auto_map={"AutoModel": "x.y"})), "wants to run code of its own"),
    ("unknown architecture", edit(lambda c: c.update(architectures=["MambaForCausalLM"])), "is a MambaForCausalLM"),
    ("quantized", edit(lambda c: c.update(quantization_config={"quant_method": "gptq"})), "holds quantized weights"),
    ("other shape", edit(lambda c: c.update(intermediate_size=96)), r"but config\.json makes it"),
    ("no such setting", edit(lambda c: c.update(hidden_size="many")), "cannot be used"),
    ("tensor missing", stored(lambda t: t.pop(NORM)), r"lacks the weights `model\.norm\.weight` \(1 in all\)"),
    ("integers", stored(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), "is stored as I8"),
    ("no weights", lambda folder: (folder / "model.safetensors").unlink(), r"holds no \*\.safetensors"),
    (
        "cut off",
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50]),
        "cannot be read",
    ),
    ("garbled", lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 200), "cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_what_cannot_be_used_is_refused_with_its_reason(tiny: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "broken"))
    damage(folder)
    with pytest.raises(ModelError, match=message) as found:
        build(folder)
    assert found.value.remedy


def test_each_worker_holds_its_own_part_and_little_more(tiny: Path, tmp_path: Path) -> None:
    """Four workers load 200 MB of fp32 weights, sharded: none of them ever holds much more than a quarter of them."""
    big = make_tiny(tmp_path / "big", hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12)
    size = (big / "model.safetensors").stat().st_size
    code = tmp_path / "load.py"
    code.write_text(LOAD)
    exact = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}  # what is freed is given back at once
    place = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(runs.free_port()), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(code), str(tiny), str(big)],
            env={**os.environ, **exact, **place, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for out, err in [p.communicate(timeout=600) for p in processes]:
        assert out, err
        assert size / 4 <= int(out) <= size / 4 + 12e6, (out, size)


LOAD = """
import sys, threading, time
from pathlib import Path
from tests.numerics import runs
from trainers import model, optim, parallel, resolve, weights
from trainers.learner import Learner
from trainers.spec import Placement

def private():  # bytes of this process alone, mapped files left out
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

def watch():
    global peak
    while True:
        peak = max(peak, private())
        time.sleep(0.002)

optim.build = lambda *_: None  # moments are twice the weights, and not what is asked here
world = parallel.World.current()
spec = resolve.schedule(runs.make_spec(method={"type": "full"}, scale={"sharding": "full"}), 24, Placement(workers=4))
tiny, big = map(Path, sys.argv[1:])
Learner.build(spec, tiny, world)  # whatever is loaded once
before = peak = private()
threading.Thread(target=watch, daemon=True).start()
learner = Learner.build(spec, big, world)
print(max(peak, private()) - before)
parallel.leave(0)
"""
