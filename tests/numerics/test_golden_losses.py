"""Loss trajectories that are committed: a change of what training computes shows here, whatever else it passes.

python -m tests.numerics.test_golden_losses     writes them anew; say in the commit why they changed
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.conftest import make_tiny
from tests.numerics import runs
from trainers.records import RunDir

GOLDEN = Path(__file__).parent / "golden_losses.json"
SPECS = {
    "full": runs.make_spec(method={"type": "full"}, optim={"learning_rate": 0.003}),
    "lora": runs.make_spec(),
    "lora, everything on": runs.make_spec(
        method={"dora": True, "rslora": True, "dropout": 0.1},
        optim={"neftune_alpha": 5.0, "label_smoothing": 0.1, "z_loss": 0.001, "weight_decay": 0.1, "schedule": "linear"},
    ),
    "qlora": runs.make_spec(method={"type": "qlora"}),
}


def losses(name: str, tiny: Path, scratch: Path) -> dict[str, list[float]]:
    store = runs.make_store(scratch / "stores" / "golden")
    assert runs.run_training(tiny, store, scratch / "run", SPECS[name]).status == "finished"
    steps = RunDir(scratch / "run").steps()
    return {
        "train": [round(s.train_loss, 6) for s in steps],
        "validation": [round(s.valid_loss, 6) for s in steps if s.valid_loss is not None],
    }


@pytest.mark.parametrize("name", SPECS)
def test_losses_are_the_committed_ones(tiny: Path, tmp_path: Path, name: str) -> None:
    want, got = json.loads(GOLDEN.read_text())[name], losses(name, tiny, tmp_path)
    for split in ("train", "validation"):
        assert got[split] == pytest.approx(want[split], abs=2e-4), split  # another CPU rounds otherwise, and ten steps carry it on


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model_dir = make_tiny(Path(folder) / "tiny-llama")
        made = {name: losses(name, model_dir, Path(folder) / str(i)) for i, name in enumerate(SPECS)}
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
