from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from trainers import catalogue, resolve
from trainers.errors import SpecError, UnknownModel
from trainers.spec import JobSpec, Placement

DATA = {"train": [{"path": "a.jsonl"}]}


@pytest.mark.parametrize(
    ("value", "key", "said"),
    [
        ({}, "data", "is missing"),
        ({"dta": DATA}, "dta", "Did you mean `data`"),
        ({"data": {"train": [{"path": "a", "fromat": "x"}]}}, "data.train[0].fromat", "Did you mean `format`"),
        ({"data": {"train": [{"pth": "x"}]}}, "data.train[0].pth", "Did you mean `path`"),
        ({"data": {"train": []}}, "data.train", "at least 1"),
        ({"data": {**DATA, "validation": 0.9}}, "data.validation", "less than or equal to 0.5"),
        ({"data": {**DATA, "validation": [{"pth": "x"}]}}, "data.validation[0].pth", "Did you mean `path`"),
        ({"data": DATA, "optim": {"epochs": 0}}, "optim.epochs", "greater than or equal to 1"),
        ({"data": DATA, "optim": {"learning_rate": "fast"}}, "optim.learning_rate", "'auto'"),
        ({"data": DATA, "optim": {"learning_rat": 1}}, "optim.learning_rat", "Did you mean `learning_rate`"),
        ({"data": DATA, "validate": {"every": 3}}, "validate.every", "Did you mean `every_steps`"),
        ({"data": DATA, "method": {"type": "dpo"}}, "method.type", "lora"),
        ({"data": DATA, "name": "a b"}, "name", "pattern"),
    ],
)
def test_a_mistake_is_refused_with_key_value_rule_and_remedy(value: Any, key: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        JobSpec.parse(value)
    error = pickle.loads(pickle.dumps(caught.value))  # it crosses process boundaries
    assert error.param == key
    assert said in str(error)
    assert key in error.message
    assert error.remedy
    assert "\n" not in str(error)


@pytest.mark.parametrize("value", [None, [], "job", 3])
def test_something_else_than_a_mapping_is_refused(value: Any) -> None:
    with pytest.raises(SpecError, match="must be a mapping"):
        JobSpec.parse(value)


def test_json_round_trip() -> None:
    spec = JobSpec.parse({"data": DATA, "validate": {"every_steps": 7}, "optim": {"learning_rate": 0.1}})
    assert JobSpec.model_validate_json(spec.to_json()) == spec
    assert '"validate"' in spec.to_json()


def test_load_reads_yaml_and_takes_paths_from_the_files_own_folder(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "name: x\ndata: {train: [{path: a.jsonl}, {path: 's3://b/c.jsonl'}]}\nevaluate: {tasks: [{path: t.jsonl}]}\n"
    )
    spec = JobSpec.load(tmp_path / "job.yaml")
    assert [s.path for s in spec.data.train] == [str(tmp_path / "a.jsonl"), "s3://b/c.jsonl"]
    assert [s.shown for s in spec.data.train] == ["a.jsonl", "c.jsonl"]
    assert spec.evaluate.tasks[0].path == str(tmp_path / "t.jsonl")


@pytest.mark.parametrize(("text", "said"), [(None, "No such file"), ("a: [", "is not YAML"), ("\xff", "must be a mapping")])
def test_load_refuses_what_it_cannot_read(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(SpecError, match=said):
        JobSpec.load(tmp_path / "job.yaml")


def test_every_auto_becomes_a_number() -> None:
    base = catalogue.find("smollm2-135m-instruct")
    place = Placement(workers=2)
    spec = resolve.schedule(resolve.defaults(JobSpec.parse({"data": DATA}), base), 1000, place)
    assert "auto" not in spec.model_dump_json(exclude={"data": True, "method": True, "model": {"template"}})
    assert spec.optim.learning_rate == base.learning_rate["lora"]
    assert spec.validate_.every_steps == spec.checkpoint.every_steps == 125 // 5
    assert spec.scale.workers == 2


def test_what_was_set_is_left_alone() -> None:
    value = {
        "data": DATA,
        "optim": {"batch_size": 3, "learning_rate": 0.5},
        "validate": {"every_steps": 9},
        "scale": {"tokens_per_microbatch": 99},
    }
    spec = resolve.schedule(resolve.defaults(JobSpec.parse(value), catalogue.find("smollm2-135m-instruct")), 1000, Placement())
    assert (spec.optim.batch_size, spec.optim.learning_rate) == (3, 0.5)
    assert (spec.validate_.every_steps, spec.checkpoint.every_steps, spec.scale.tokens_per_microbatch) == (9, 9, 99)


def test_longer_than_the_context_is_refused() -> None:
    spec = JobSpec.parse({"data": DATA, "model": {"max_length": 10_000}})
    with pytest.raises(SpecError, match="8192"):
        resolve.defaults(spec, catalogue.find("smollm2-135m-instruct"))


def test_models_are_found_by_id_alias_and_nothing_else() -> None:
    base = catalogue.find("smollm2-135m-instruct")
    assert catalogue.find(base.aliases[0]) is base
    with pytest.raises(UnknownModel, match="Did you mean `smollm2-135m-instruct`"):
        catalogue.find("smolm2-135m-instruct")
    with pytest.raises(UnknownModel, match="On offer"):
        catalogue.find("zzz")


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"method": {"type": "qlora"}, "scale": {"sharding": "full"}}, "scale.sharding"),
        ({"method": {"type": "full"}, "optim": {"type": "adamw8bit"}, "scale": {"sharding": "hybrid"}}, "optim.type"),
        ({"scale": {"sharding": "none", "cpu_offload": True}}, "scale.cpu_offload"),
        ({"scale": {"master": "bf16"}}, "scale.master"),
        ({"method": {"type": "full"}, "scale": {"master": "bf16", "precision": "fp32"}}, "scale.master"),
    ],
)
def test_what_cannot_go_together_is_refused_with_its_key(sections: dict, key: str) -> None:
    with pytest.raises(SpecError) as found:
        resolve.defaults(JobSpec.parse({"data": DATA, **sections}), catalogue.find("smollm2-135m-instruct"))
    assert found.value.param == key and found.value.remedy


@pytest.mark.parametrize(
    ("method", "scale", "place", "base_bytes", "sharding"),
    [
        ("full", {}, Placement(workers=1), 0, "none"),
        ("full", {}, Placement(workers=2), 0, "full"),
        ("full", {"cpu_offload": True}, Placement(workers=1), 0, "full"),
        ("lora", {}, Placement(workers=8), 15 * 2**30, "none"),
        ("lora", {}, Placement(workers=8), 140 * 2**30, "full"),
        ("qlora", {}, Placement(workers=8), 140 * 2**30, "none"),
        ("lora", {"sharding": "hybrid"}, Placement(workers=8), 0, "hybrid"),
    ],
)
def test_weights_are_shared_where_that_helps(method: str, scale: dict, place: Placement, base_bytes: int, sharding: str) -> None:
    spec = resolve.defaults(
        JobSpec.parse({"data": DATA, "method": {"type": method}, "scale": scale}), catalogue.find("smollm2-135m-instruct")
    )
    assert resolve.schedule(spec, 100, place, base_bytes).scale.sharding == sharding


def test_a_key_inside_one_of_several_sections_is_named_as_the_user_wrote_it() -> None:
    for value, key, told in (
        ({"method": {"type": "qlora", "dora": True}}, "method.dora", "Did you mean"),
        ({"method": {"type": "full", "r": 4}}, "method.r", "Known keys here: type"),
        ({"scale": {"workers": {"maxx": 3}}}, "scale.workers.maxx", "Did you mean `max`?"),
    ):
        with pytest.raises(SpecError, match=told) as found:
            JobSpec.parse({"data": DATA, **value})
        assert found.value.param == key
