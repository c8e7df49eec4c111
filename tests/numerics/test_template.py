"""A run's chat template goes with what it makes: every adapter, and the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.numerics.runs import make_spec, make_store, run_training
from trainers import merge
from trainers.chat import Chat
from trainers.fold import AdapterFold
from trainers.records import TEMPLATE_FILE
from trainers.tensors import ModelFolder


def test_adapters_and_the_merged_model_carry_the_runs_template(tiny: Path, tmp_path: Path) -> None:
    # Turns end with another token than the base's generation settings know.
    template = (tiny / TEMPLATE_FILE).read_text().replace("<|im_end|>", "<|endoftext|>")
    run = tmp_path / "run"
    run.mkdir()
    (run / TEMPLATE_FILE).write_text(template)
    run_training(tiny, make_store(tmp_path / "store"), run, make_spec(optim={"epochs": 1}))
    adapters = sorted((run / "adapters").iterdir())
    assert adapters and all((adapter / TEMPLATE_FILE).read_text() == template for adapter in adapters)

    (tmp_path / "merged").mkdir()
    merge.write_model(tiny, AdapterFold(adapters[-1], ModelFolder(tiny)), tmp_path / "merged", adapters[-1] / TEMPLATE_FILE)
    chat = Chat.load(tmp_path / "merged")
    assert chat.template == template and chat.end_of_turn == "<|endoftext|>"
    assert set(json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]) == chat.stop_ids

    bare = Path(shutil.copytree(adapters[-1], tmp_path / "bare"))
    (bare / TEMPLATE_FILE).unlink()
    (tmp_path / "plain").mkdir()
    merge.write_model(tiny, AdapterFold(bare, ModelFolder(tiny)), tmp_path / "plain", bare / TEMPLATE_FILE)
    assert Chat.load(tmp_path / "plain").template == Chat.load(tiny).template
    assert (tmp_path / "plain" / "generation_config.json").read_text() == (tiny / "generation_config.json").read_text()
