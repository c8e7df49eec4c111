from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from serve.adapters import AdapterRegistry, load_adapter, make_adaptable
from trainers import model as base_model
from trainers.errors import ModelError, Unavailable


@pytest.fixture(scope="module")
def shapes(tiny: Path) -> dict[str, tuple[int, int]]:
    return make_adaptable(base_model.load(tiny, torch.float32))[1]


def changed(adapter: str, folder: Path, **config: object) -> Path:
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ],
)
def test_more_than_plain_lora_is_refused(adapters, shapes, tmp_path: Path, config: dict, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        load_adapter(str(changed(adapters[0], tmp_path / "a", **config)), shapes, torch.float32)


def test_what_cannot_be_read_is_refused(adapters, shapes, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a readable PEFT"):
        load_adapter(str(tmp_path / "nothing"), shapes, torch.float32)
    pickled = changed(adapters[0], tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_adapter(str(pickled), shapes, torch.float32)
    cut = changed(adapters[0], tmp_path / "cut")
    file = cut / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="SafetensorError"):
        load_adapter(str(cut), shapes, torch.float32)
    with pytest.raises(ModelError, match="not a readable PEFT"):
        load_adapter(str(changed(adapters[0], tmp_path / "rank", r=None)), shapes, torch.float32)


def test_an_adapter_of_another_base_is_refused(adapters, shapes) -> None:
    wider = {name: (rows, columns + 1) for name, (rows, columns) in shapes.items()}
    with pytest.raises(ModelError, match="has shapes"):
        load_adapter(adapters[0], wider, torch.float32)
    fewer = {name: shape for name, shape in shapes.items() if "layers.1." not in name}
    with pytest.raises(ModelError, match="cannot take"):
        load_adapter(adapters[0], fewer, torch.float32)


def test_the_least_recently_used_idle_adapter_leaves(adapters, shapes) -> None:
    a, b, c = adapters
    sizes = {path: load_adapter(path, shapes, torch.float32).num_bytes for path in adapters}
    registry = AdapterRegistry(shapes, torch.float32, max_bytes=sum(sizes.values()) - 1)
    first, second = registry.acquire(a), registry.acquire(b)
    registry.release(first)
    registry.release(second)
    registry.release(registry.acquire(a))  # now b is the one that was not used for longest
    third = registry.acquire(c)
    assert registry.loaded() == [a, c]
    held = registry.acquire(a)
    with pytest.raises(Unavailable, match="running requests hold"):
        registry.acquire(b)
    assert registry.loaded() == [c, a]
    registry.release(third)
    registry.acquire(b)
    assert registry.loaded() == [a, b] and held.num_users == 1
