"""Every recipe parses, resolves, fits the hardware it names, and says the memory that cluster/memory.py computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.memory import GIB, Memory, estimate, num_workers, planned
from trainers.catalogue import find
from trainers.prepare import prepare
from trainers.records import RunDir
from trainers.spec import JobSpec
from trainers.store import TokenStore

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
WANTED = {
    "llama3-70b-full",
    "llama3-70b-full-bf16",
    "llama3-70b-lora",
    "llama3-70b-qlora",
    "llama3-8b-full",
    "llama3-8b-lora",
    "llama3-8b-qlora",
    "llama3-3b-lora",
    "llama3-1b-full",
    "smollm2-135m-full",
    "smollm2-135m-lora",
    "smollm2-135m-qlora",
}


def said(path: Path) -> dict[str, str]:
    """The recipe's comment block: heading -> what follows; the first line is under ''."""
    lines = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return {"": lines[0]} | {key: value for key, _, value in (line.partition(": ") for line in lines[1:])}


def computed(path: Path) -> Memory:
    spec = JobSpec.load(path)
    workers = num_workers(spec)
    device = "cpu" if "CPU" in said(path)["Hardware"] else "cuda"
    shape, spec = planned(spec, find(spec.model.base), workers, device)
    return estimate(shape, spec.method, spec.optim, spec.scale, workers, device=device)


def test_all_are_there() -> None:
    assert {path.stem for path in RECIPES} == WANTED


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_is_so(path: Path) -> None:
    spec, words, memory = JobSpec.load(path), said(path), computed(path)
    assert spec.name == path.stem and spec.method.type == path.stem.removesuffix("-bf16").rpartition("-")[2]
    assert words[""].endswith(".")
    told = words.get("Memory per GPU") or words["Memory per worker"]
    assert "computed" in told and "not measured" in told
    assert float(told.split()[0]) == pytest.approx(memory.total / GIB, abs=0.051)
    assert float(words["Bytes a weight"].split()[0]) == pytest.approx(memory.bytes_per_weight, abs=0.051)
    hardware = re.match(r"(\d+) .*?(\d+) GiB", words["Hardware"])
    assert hardware is not None and int(hardware[1]) == num_workers(spec)
    assert memory.fits(int(hardware[2]) * GIB)
    if nodes := re.search(r"(\d+) nodes? of 8", words["Hardware"]):
        assert int(nodes[1]) * 8 == num_workers(spec)


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("smollm2")], ids=lambda path: path.stem)
def test_small_recipes_name_data_that_is_there(path: Path) -> None:
    spec = JobSpec.load(path)
    assert all(Path(source.path).exists() for source in spec.data.train)
    assert all(Path(task.path).exists() for task in spec.evaluate.tasks)


def test_a_small_recipe_s_data_can_be_prepared(smollm: Path, tmp_path: Path) -> None:
    record = prepare(
        JobSpec.load(FOLDER / "smollm2-135m-full.yaml"), smollm, tmp_path / "stores", RunDir(tmp_path / "run"), executor="local"
    )
    store = TokenStore(Path(record.store), "train")
    assert len(store) > 700 and store.lengths.max() <= 256
