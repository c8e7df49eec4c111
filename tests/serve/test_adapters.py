from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from serve.adapters import PATIENCE_STEPS, Adapter, AdapterRegistry, Mix, load_adapter, make_adaptable
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


def test_an_evicted_adapter_counts_until_its_last_user_leaves(adapters, shapes) -> None:
    a, b, _ = adapters
    registry = AdapterRegistry(shapes, torch.float32, max_bytes=10**9)
    first = registry.acquire(a)
    registry.evict(a)
    assert registry.loaded() == [] and registry.num_bytes == first.num_bytes and first.is_gone
    again = registry.acquire(a)
    assert again is not first and again.serial != first.serial and registry.num_bytes == 2 * first.num_bytes
    registry.release(first)
    assert registry.num_bytes == first.num_bytes
    registry.release(again)
    registry.evict(a)
    registry.evict(b)
    assert registry.num_bytes == 0
    tight = AdapterRegistry(shapes, torch.float32, max_bytes=first.num_bytes)
    held = tight.acquire(a)
    tight.evict(a)
    with pytest.raises(Unavailable):
        tight.acquire(a)
    tight.release(held)
    tight.acquire(a)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def memory(mix: Mix, loaded: list[Adapter]) -> int:
    """Bytes of all weights that are held, each storage counted once."""
    tensors = [t for pair in mix.stacked.values() for t in pair] + [t for a in loaded for pair in a.weights.values() for t in pair]
    return sum({storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def test_mixing_changes_no_weight_and_keeps_nothing_twice(adapters, shapes) -> None:
    loaded = [load_adapter(path, shapes, torch.float32) for path in adapters]
    wanted = [{name: (a.clone(), b.clone()) for name, (a, b) in one.weights.items()} for one in loaded]
    total = sum(a.num_bytes for a in loaded)
    mix = Mix()
    a, b, c = loaded
    for tokens in ([a, None], [a, b, b], [c], [None], [b, c, a], [a], [c, b]):
        mix.choose(tokens)
        zeros = sum(t.nbytes for pair in mix.stacked.values() for t in pair) - sum(m.num_bytes for m in mix.adapters)
        assert memory(mix, loaded) <= total + zeros
        for one, weights in zip(loaded, wanted, strict=True):
            assert one.weights.keys() == weights.keys()
            assert all(torch.equal(one.weights[n][i], weights[n][i]) for n in weights for i in (0, 1))
    b.is_gone = True
    mix.choose([c])
    assert b not in mix.adapters and memory(mix, [a, c]) == a.num_bytes + c.num_bytes
    a.is_gone = c.is_gone = True
    mix.let_go()
    assert mix.adapters == () and not mix.stacked


def test_idle_adapters_stay_in_the_mix_only_while_they_are_cheap(adapters, shapes) -> None:
    a, b, c = (load_adapter(path, shapes, torch.float32) for path in adapters)  # ranks 4, 2 and 8
    mix = Mix()
    mix.choose([a, b])
    mix.choose([b])
    assert set(mix.adapters) == {a, b}  # nothing needs to be stacked anew
    mix.choose([c])
    assert set(mix.adapters) == {a, b, c}  # 6 idle ranks beside 8
    mix.choose([a])
    assert mix.mask_TR is not None and mix.mask_TR.sum() == 4
    for _ in range(PATIENCE_STEPS - 1):  # the step before was one already
        mix.choose([b, b])
        assert set(mix.adapters) == {a, b, c}
    mix.choose([b])
    assert set(mix.adapters) == {b}
