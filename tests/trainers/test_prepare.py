"""The prepare stage end to end: the same store from every executor, every example accounted for, the first error named."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainers.chat import Chat
from trainers.errors import DataError, Fenced, TemplateError, Unavailable
from trainers.examine import TOO_LONG
from trainers.prepare import prepare, survey
from trainers.records import DataReport, PrepareRecord, RunDir
from trainers.spec import JobSpec
from trainers.spool import Spool
from trainers.store import StoreWriter, TokenStore, is_store


def rows(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Messages rows of several turns, all different, with a column `kind`."""
    draw = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "Grüße", "你好", "🙂", "1234", "\n", "<filename>"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 8))) + f" {draw.random()}"

    return [
        {
            "messages": [{"role": role, "content": text()} for _ in range(draw.randint(1, 2)) for role in ("user", "assistant")],
            "kind": draw.choice(["a", "b"]),
        }
        for _ in range(num)
    ]


def jsonl(path: Path, content: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


class Desk:
    """A folder with runs and stores; every job gets a run directory of its own."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model, self.jobs = root, model, 0

    def prepare(self, data: dict[str, Any], *, executor: Any = "local", stores: str = "stores", **more: Any) -> PrepareRecord:
        self.jobs += 1
        run = RunDir(self.root / f"run{self.jobs}", 1, "driver")
        chunk_bytes = more.pop("chunk_bytes", 4 * 2**20)
        spec = JobSpec.parse({"data": data, "model": more})
        return prepare(spec, self.model, self.root / stores, run, executor=executor, chunk_bytes=chunk_bytes)

    def report(self) -> DataReport:
        report = RunDir(self.root / f"run{self.jobs}").read("data_report.json", DataReport)
        assert report is not None
        return report


@pytest.fixture
def desk(tmp_path: Path, tiny: Path) -> Desk:
    return Desk(tmp_path, tiny)


def examples(record: PrepareRecord, split: str) -> dict[str, tuple[list[int], list[float]]]:
    store = TokenStore(Path(record.store), split)
    return {store.example_id(i): tuple(part.tolist() for part in store.get(i)) for i in range(len(store))}  # type: ignore[misc]


def files(record: PrepareRecord) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(record.store).iterdir())}


def test_every_example_is_stored_as_chat_makes_it(desk: Desk) -> None:
    data = rows(60)
    record = desk.prepare({"train": [{"path": jsonl(desk.root / "d.jsonl", data)}], "validation": 0.2, "slice_by": "kind"})
    chat = Chat.load(desk.model)
    train, validation = examples(record, "train"), examples(record, "validation")
    assert set(train) | set(validation) == {f"d.jsonl:{i}" for i in range(1, 61)} and not set(train) & set(validation)
    assert list(train) == sorted(train, key=lambda id: int(id.split(":")[1]))  # file order
    for i, row in enumerate(data, 1):
        wanted = chat.example(row["messages"])
        assert (train | validation)[f"d.jsonl:{i}"] == (wanted.ids.tolist(), wanted.weights)

    report = desk.report()
    (source,) = report.sources
    assert (source.format, source.read, source.kept, source.dropped) == ("messages", 60, 60, {})
    assert report.train.examples == len(train) and report.validation.examples == len(validation) > 1
    assert report.train.tokens == sum(len(ids) for ids, _ in train.values())
    assert report.train.supervised_tokens == sum(sum(weights) for _, weights in train.values())
    assert report.train.length_max == max(len(ids) for ids, _ in train.values()) >= report.train.length_p95 >= report.train.length_p50 > 0
    assert sum(report.train.slices.values()) == len(train)
    run = RunDir(desk.root / "run1")
    assert run.read("prepare.json", PrepareRecord) == record.model_copy(update={"attempt": 1})
    assert any("Prepared data" in event.message for _, events in run.events() for event in events)


def test_three_formats_give_the_same_tokens(desk: Desk) -> None:
    pairs = [(f"Question {i} é🙂", f"Answer\n{i}") for i in range(50)]
    layouts = {
        "messages": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs],
        "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in pairs],
        "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs],
    }
    found = []
    for name, content in layouts.items():
        record = desk.prepare({"train": [{"path": jsonl(desk.root / name / "d.jsonl", content)}]})
        assert desk.report().sources[0].format == name
        found.append((examples(record, "train"), examples(record, "validation")))
    assert found[0] == found[1] == found[2] and len(found[0][0]) + len(found[0][1]) == 50


def test_too_long_examples_are_refused_by_name_or_dropped_and_counted(desk: Desk) -> None:
    data = rows(20)
    data[4]["messages"][0]["content"] = "word " * 300
    data[9]["messages"][0]["content"] = "word " * 300
    sources = {"train": [{"path": jsonl(desk.root / "d.jsonl", data)}]}
    with pytest.raises(DataError, match=r"d.jsonl:5: the example has 1,\d\d\d tokens, more than model.max_length = 512"):
        desk.prepare(sources, max_length=512)
    assert list((desk.root / "stores").iterdir()) == []
    record = desk.prepare(sources, max_length=512, overlength="drop")
    (source,) = desk.report().sources
    assert (source.read, source.kept, source.dropped) == (20, 18, {TOO_LONG: 2})
    assert len(examples(record, "train")) + len(examples(record, "validation")) == 18
    assert any("2 of 20 rows left out" in e.message for _, events in RunDir(desk.root / "run2").events() for e in events)
    with pytest.raises(DataError, match=r"d.jsonl: no example is left to train on \(20 longer than max_length\)") as error:
        desk.prepare(sources, max_length=8, overlength="drop")
    assert error.value.param == "training_file"


def test_validation_is_chosen_by_content_alone(desk: Desk) -> None:
    data = rows(100)

    def held_out(content: list[dict[str, Any]], seed: int = 0) -> set[str]:
        path = jsonl(desk.root / f"{desk.jobs}.jsonl", content)
        record = desk.prepare({"train": [{"path": path}], "validation": 0.2})
        ids = {id.split(":")[1] for id in examples(record, "validation")}
        return {json.dumps(content[int(line) - 1]["messages"]) for line in ids}

    first = held_out(data)
    assert 5 <= len(first) <= 40
    assert held_out(data[::-1]) == first
    assert held_out(data[:50]) == {m for m in first if m in {json.dumps(row["messages"]) for row in data[:50]}}


@pytest.mark.parametrize("num", [2, 3, 5])
@pytest.mark.parametrize("fraction", [0.001, 0.5])
def test_both_splits_get_an_example_where_there_are_two(desk: Desk, num: int, fraction: float) -> None:
    path = ""
    for seed in range(8):
        path = jsonl(desk.root / f"{num}-{seed}.jsonl", rows(num, seed))
        record = desk.prepare({"train": [{"path": path}], "validation": fraction})
        train, validation = len(TokenStore(Path(record.store), "train")), len(TokenStore(Path(record.store), "validation"))
        assert train >= 1 and validation >= 1 and train + validation == num
    record = desk.prepare({"train": [{"path": jsonl(desk.root / "same.jsonl", rows(1) * num)}], "validation": fraction})
    assert len(TokenStore(Path(record.store), "train")) == num  # copies of one example cannot be held out from it
    record = desk.prepare({"train": [{"path": path}], "validation": 0})
    assert len(TokenStore(Path(record.store), "validation")) == 0


def test_validation_sources_of_their_own(desk: Desk) -> None:
    train, validation = jsonl(desk.root / "t.jsonl", rows(10)), jsonl(desk.root / "v.jsonl", rows(4, seed=1))
    record = desk.prepare({"train": [{"path": train}], "validation": [{"path": validation}]})
    assert len(examples(record, "train")) == 10 and set(examples(record, "validation")) == {f"v.jsonl:{i}" for i in range(1, 5)}
    assert [s.name for s in desk.report().sources] == ["t.jsonl", "v.jsonl"]
    Path(validation).write_text("{}\n")
    with pytest.raises(DataError) as error:
        desk.prepare({"train": [{"path": train}], "validation": [{"path": validation, "format": "messages"}]})
    assert error.value.param == "validation_file" and error.value.message.startswith("v.jsonl:1 ")


def test_the_same_data_is_prepared_once_wherever_it_lies(desk: Desk) -> None:
    data = rows(12)
    first = desk.prepare({"train": [{"path": jsonl(desk.root / "a.jsonl", data)}]})
    report = desk.report()
    again = desk.prepare({"train": [{"path": jsonl(desk.root / "elsewhere" / "b.jsonl", data), "format": "messages"}]})
    assert (first.cached, again.cached) == (False, True) and again.key == first.key and again.store == first.store
    assert desk.report().train == report.train and [s.name for s in desk.report().sources] == ["b.jsonl"]


def test_the_key_follows_everything_that_matters(desk: Desk, smollm: Path) -> None:
    path = jsonl(desk.root / "a.jsonl", rows(12))
    base = {"train": [{"path": path}]}
    keys = [desk.prepare(base).key]
    keys.append(desk.prepare({**base, "train_on": "last_assistant"}).key)
    keys.append(desk.prepare({**base, "validation": 0.3}).key)
    keys.append(desk.prepare({**base, "slice_by": "kind"}).key)
    keys.append(desk.prepare(base, max_length=1024).key)
    keys.append(desk.prepare(base, overlength="drop").key)
    keys.append(desk.prepare({"train": [{"path": path}, {"path": path}]}).key)
    desk.model = smollm
    keys.append(desk.prepare(base).key)
    jsonl(Path(path), rows(13))
    keys.append(desk.prepare(base).key)
    assert len(set(keys)) == len(keys)


def test_a_prepared_run_is_left_as_it_is_and_a_lost_store_is_made_again(desk: Desk) -> None:
    path = Path(jsonl(desk.root / "a.jsonl", rows(12)))
    spec = JobSpec.parse({"data": {"train": [{"path": str(path)}]}})
    run = RunDir(desk.root / "run", 1, "driver")
    record = prepare(spec, desk.model, desk.root / "stores", run, executor="local")
    kept = path.read_bytes()
    path.unlink()  # a stage that is done needs its sources no more
    assert prepare(spec, desk.model, desk.root / "stores", run, executor="local").key == record.key
    path.write_bytes(kept)
    (Path(record.store) / "manifest.json").unlink()
    again = prepare(spec, desk.model, desk.root / "stores", run, executor="local")
    assert not again.cached and again.key == record.key
    TokenStore(Path(again.store), "train").verify()


def test_a_replaced_attempt_writes_nothing(desk: Desk) -> None:
    RunDir(desk.root / "run1", 2).grant()
    with pytest.raises(Fenced):
        desk.prepare({"train": [{"path": jsonl(desk.root / "a.jsonl", rows(3))}]})
    assert not (desk.root / "run1" / "prepare.json").exists()


def test_two_jobs_may_prepare_the_same_data_at_once(desk: Desk) -> None:
    path = jsonl(desk.root / "a.jsonl", rows(50))
    spec = JobSpec.parse({"data": {"train": [{"path": path}]}})
    done: list[PrepareRecord] = []

    def job(n: int) -> None:
        done.append(prepare(spec, desk.model, desk.root / "stores", RunDir(desk.root / f"job{n}", 1, "driver"), executor="local"))

    threads = [threading.Thread(target=job, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({r.key for r in done}) == 1 and len(done) == 4
    assert [p.name for p in (desk.root / "stores").iterdir()] == [done[0].key]


BAD = [
    (
        {"messages": [{"role": "user", "content": "q<|im_end|>"}, {"role": "assistant", "content": "a"}]},
        r"Message 1 \(user\) contains <\|im_end\|>",
    ),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}, "No assistant turn is trained"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}, "empty answer"),
]


@pytest.mark.parametrize(("row", "says"), BAD)
def test_a_bad_row_stops_the_job_with_file_and_line(desk: Desk, row: dict[str, Any], says: str) -> None:
    content = rows(10)
    content[6] = row
    with pytest.raises(DataError, match=rf"^d.jsonl:7:? .*{says}") as error:
        desk.prepare({"train": [{"path": jsonl(desk.root / "d.jsonl", content)}]})
    assert error.value.param == "training_file" and error.value.remedy
    assert not (desk.root / "run1" / "prepare.json").exists() and list((desk.root / "stores").iterdir()) == []


def test_an_unknown_slice_column_is_refused(desk: Desk) -> None:
    with pytest.raises(DataError, match="No example has a column `knd`"):
        desk.prepare({"train": [{"path": jsonl(desk.root / "d.jsonl", rows(5))}], "slice_by": "knd"})


def test_a_model_without_template_is_refused(desk: Desk) -> None:
    desk.model = desk.root
    with pytest.raises(TemplateError):
        desk.prepare({"train": [{"path": jsonl(desk.root / "d.jsonl", rows(5))}]})


def test_tools_are_carried_into_the_store(desk: Desk) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    tool = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            {"role": "assistant", "content": "Rain."},
        ],
        "tools": [tool],
    }
    path = jsonl(desk.root / "tools.jsonl", [{**row, "n": n} for n in range(3)])
    record = desk.prepare({"train": [{"path": path}], "validation": 0}, template="chatml")
    chat = Chat.load(desk.model, "chatml")
    ids, weights = examples(record, "train")["tools.jsonl:1"]
    trained = chat.token_bytes.say([id for id, weight in zip(ids, weights, strict=True) if weight]).decode()
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in trained and trained.endswith("Rain.<|im_end|>")
    assert RunDir(desk.root / "run1").path("chat_template.jinja").read_text() == chat.template


def test_a_mixture_repeats_and_thins_sources(desk: Desk) -> None:
    paths = [jsonl(desk.root / f"{name}.jsonl", rows(40, seed)) for seed, name in enumerate("abc")]
    sources = [{"path": path, "weight": weight} for path, weight in zip(paths, (2.5, 0.25, 1), strict=True)]
    record = desk.prepare({"train": sources, "validation": 0})
    store = TokenStore(Path(record.store), "train")
    ids = [store.example_id(i) for i in range(len(store))]
    counts = Counter(id[0] for id in ids)
    assert counts == {"a": 100, "b": 10, "c": 40} and set(Counter(id for id in ids if id[0] == "a").values()) == {2, 3}
    assert [s.examples for s in desk.report().sources] == [100, 10, 40] and [s.kept for s in desk.report().sources] == [40, 40, 40]
    assert desk.report().train.examples == 150
    again = desk.prepare({"train": sources, "validation": 0}, stores="again", chunk_bytes=2000)
    assert files(again) == files(record)


def test_duplicates_conflicts_and_leakage_are_counted_with_cases(desk: Desk) -> None:
    def pair(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    data = [*rows(30), pair("q", "one"), pair("q", "two"), pair("r", "same"), pair("r", "same "), pair("held", "out")]
    train, held = jsonl(desk.root / "t.jsonl", data), jsonl(desk.root / "v.jsonl", [pair("held", "back")])
    task = jsonl(desk.root / "task.jsonl", [pair("r", "x")])
    sources = {"train": [{"path": train}], "validation": [{"path": held}]}

    def findings(**curate: Any) -> dict[str, tuple[str, int]]:
        spec = JobSpec.parse({"data": {**sources, "curate": curate}, "evaluate": {"tasks": [{"path": task}]}})
        desk.jobs += 1
        prepare(spec, desk.model, desk.root / "stores", RunDir(desk.root / f"run{desk.jobs}", 1, "driver"), executor="local")
        return {f.step: (f.action, f.rows) for f in desk.report().findings}

    assert findings() == {"duplicates": ("report", 1), "conflicts": ("report", 2), "leakage": ("report", 3)}
    (case,) = next(f for f in desk.report().findings if f.step == "duplicates").cases
    assert case.where == "t.jsonl:34" and case.text.startswith("like t.jsonl:33: r -> same")
    assert any("leakage (report): 3 rows" in e.message for _, events in RunDir(desk.root / "run1").events() for e in events)
    assert findings(duplicates="drop", conflicts="drop", leakage="drop")["leakage"] == ("drop", 2)
    (source, _) = desk.report().sources
    assert source.dropped == {"conflicts": 2, "duplicates": 1, "leakage": 2} and source.kept == 30 == desk.report().train.examples
    near = " ".join(f"word{n}" for n in range(150))
    jsonl(Path(train), [*rows(5), pair(near, "the answer")])
    jsonl(Path(task), [pair(near + " indeed", "the answer")])
    assert "leakage" not in findings()
    assert findings(near_duplicates={"action": "report"}, leakage="drop")["leakage"] == ("drop", 1)
    jsonl(Path(train), data)
    with pytest.raises(DataError, match=r"t.jsonl:31: conflicts, as in 2 rows \(like t.jsonl:32"):
        findings(conflicts="refuse")
    assert not any(path.name.startswith(".") for path in (desk.root / "stores").iterdir())


def test_data_without_a_usable_row_is_reported_also_where_near_duplicates_are_sought(desk: Desk, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "bad.jsonl", [{"messages": [{"role": "user", "content": "only a question"}]}] * 3)
    spec = JobSpec.parse({"data": {"train": [{"path": path}], "curate": {"near_duplicates": {}}}})
    report = survey(spec, desk.model, tmp_path / "scratch")
    assert report.sources[0].read == 3 == sum(report.sources[0].dropped.values()) and report.train.examples == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"cannot be written: No space left on device"), Spool.open(tmp_path / "parts", []):
        Path("/dev/full").write_bytes(b"x")


def test_parts_of_days_ago_are_not_swept_away_while_we_go_on_from_them(tmp_path: Path) -> None:
    folder = tmp_path / ".key.parts.tmp"
    for _ in range(2):
        with Spool.open(folder, []):
            StoreWriter(tmp_path / "key").abandon()  # it removes what lies about for a day
            assert folder.exists()
        os.utime(folder, (0, 0))


def test_a_killed_prepare_goes_on_from_its_parts(desk: Desk) -> None:
    """Killed while it examines; what it had examined is not examined again, and the store is the one of an unbroken run."""
    path = jsonl(desk.root / "d.jsonl", rows(20_000))
    spec = JobSpec.parse({"data": {"train": [{"path": path}]}})
    (desk.root / "spec.json").write_text(spec.to_json())
    code = (
        "import sys; from pathlib import Path; from trainers.prepare import prepare; from trainers.records import RunDir;"
        "from trainers.spec import JobSpec; root, model = map(Path, sys.argv[1:]);"
        "spec = JobSpec.model_validate_json((root / 'spec.json').read_bytes());"
        "prepare(spec, model, root / 'killed', RunDir(root / 'runk', 1, 'driver'), executor='local', chunk_bytes=20_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(desk.root), str(desk.model)])
    try:
        deadline = time.monotonic() + 300
        while len(parts := sorted((desk.root / "killed").glob(".*/*.arrow"))) < 5:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    kept = {part: part.stat().st_mtime_ns for part in parts}
    assert not any(is_store(folder) for folder in (desk.root / "killed").iterdir())

    seen: list[Path] = []

    class Watched(RunDir):
        def progress(self, stage: str, **numbers: Any) -> None:
            seen[:] = [part for part, written in kept.items() if part.exists() and part.stat().st_mtime_ns == written] or seen
            super().progress(stage, **numbers)

    run = Watched(desk.root / "again", 1, "driver")
    record = prepare(spec, desk.model, desk.root / "killed", run, executor="local", chunk_bytes=20_000)
    assert seen == parts and not record.cached
    whole = desk.prepare({"train": [{"path": path}]}, stores="whole")
    assert files(record) == files(whole)
    assert [p.name for p in (desk.root / "killed").iterdir()] == [record.key]


def test_a_survey_counts_what_would_stop_a_job_and_writes_no_store(desk: Desk) -> None:
    content = [
        *rows(30),
        *(row for row, _ in BAD),
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x" * 900}]},
    ]
    path = jsonl(desk.root / "d.jsonl", content)
    Path(path).write_text(Path(path).read_text() + "{broken\n")
    spec = JobSpec.parse({"data": {"train": [{"path": path}]}, "model": {"max_length": 700, "overlength": "drop"}})
    told: list[tuple[int, int]] = []
    report = survey(spec, desk.model, desk.root / "scratch", on_progress=lambda done, total: told.append((done, total)))
    (source,) = report.sources
    assert source.read == 35 and source.kept == 30 == report.train.examples + report.validation.examples
    assert source.dropped[TOO_LONG] == 1 and sum(source.dropped.values()) == 5
    (refused,) = [f for f in report.findings if f.step == "refused"]
    assert refused.rows == 4 == sum(refused.detail.values()) and [case.where for case in refused.cases] == [
        f"d.jsonl:{n}" for n in (31, 32, 33, 35)
    ]
    assert (
        sum(count for _, count in report.train.lengths) == report.train.examples and report.train.lengths[-1][0] >= report.train.length_max
    )
    assert told[-1] == (35, 35) and not list(desk.root.rglob("manifest.json"))


def test_the_report_says_how_to_make_the_store_again(desk: Desk) -> None:
    path = jsonl(desk.root / "d.jsonl", rows(20))
    source = {"path": path, "licence": "cc-by-4.0", "name": "poems"}
    run = RunDir(desk.root / "run1", 1, "driver")
    spec = JobSpec.parse({"data": {"train": [source], "train_on": "last_assistant"}})
    record = prepare(spec, desk.model, desk.root / "stores", run, executor="local", requested_by="project default, key k1")
    report = run.read("data_report.json", DataReport)
    assert report is not None and report.requested_by == "project default, key k1"
    (lineage,) = report.sources
    assert (lineage.name, lineage.url, lineage.licence, lineage.bytes) == ("poems", path, "cc-by-4.0", Path(path).stat().st_size)
    assert lineage.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert report.recipe["train"][0]["sha256"] == lineage.sha256 and report.recipe["train_on"] == "last_assistant"
    key = hashlib.sha256(json.dumps(report.recipe, sort_keys=True).encode()).hexdigest()[:32]
    assert key == record.key and report.tokenizer == "fastokens" and "fastokens" in report.recipe["versions"]


# -- on Ray --------------------------------------------------------------------------------------------------------------


RAY_WARNS_ITSELF = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")  # its context sets deprecated fields of its own


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    with tempfile.TemporaryDirectory(prefix="ry", ignore_cleanup_errors=True) as folder:  # a short path: sockets live in it
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        yield
        ray.shutdown()


@RAY_WARNS_ITSELF
def test_ray_and_a_plain_loop_write_the_same_bytes(desk: Desk, local_ray: None) -> None:
    content = rows(400)
    content[50]["messages"][0]["content"] = "word " * 600
    array = desk.root / "array.json"
    array.write_text(json.dumps(rows(30, seed=1), indent=1))
    data = {"train": [{"path": jsonl(desk.root / "d.jsonl", content)}, {"path": str(array)}], "slice_by": "kind"}
    local = desk.prepare(data, stores="local", overlength="drop")
    report = desk.report()
    on_ray = desk.prepare(data, stores="ray", overlength="drop", executor="ray", chunk_bytes=10_000)
    assert files(local) == files(on_ray) and local.key == on_ray.key
    assert desk.report().sources == report.sources and report.sources[0].dropped == {TOO_LONG: 1}


@RAY_WARNS_ITSELF
def test_ray_raises_the_first_bad_row_in_file_order(desk: Desk, local_ray: None) -> None:
    content = rows(400)
    for line in (391, 395, 120, 300):
        content[line - 1] = {"messages": [{"role": "user", "content": f"bad {line}"}]}
    content[119]["messages"] *= 20_000  # the first bad row takes longest, so that later ones are found before it
    with pytest.raises(DataError, match=r"^d.jsonl:120 has no assistant turn") as error:
        desk.prepare({"train": [{"path": jsonl(desk.root / "d.jsonl", content)}]}, executor="ray", chunk_bytes=2_000)
    assert type(error.value) is DataError and error.value.param == "training_file"
    assert list((desk.root / "stores").iterdir()) == []


@RAY_WARNS_ITSELF
def test_work_stays_off_nodes_with_accelerators(tmp_path: Path) -> None:
    """In a process of its own: a cluster of two nodes, one of which has GPUs."""
    code = """
import sys, tempfile, ray, ray.data
from ray.cluster_utils import Cluster
from trainers.prepare import cpu_nodes
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
assert cpu_nodes() == {}, cpu_nodes()
gpu = cluster.add_node(num_cpus=2, num_gpus=2, labels={"ray.io/accelerator-type": "A100"})
def where(batch):
    return {"node": [ray.get_runtime_context().get_node_id()] * len(batch["item"])}
items = ray.data.from_items(list(range(8)), override_num_blocks=8).map_batches(where, **cpu_nodes())
found = {row["node"] for row in items.take_all()}
print("ran on", len(found), "node(s), GPU node:", gpu.node_id in found)
ray.shutdown()
cluster.shutdown()
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ran on 1 node(s), GPU node: False" in told.stdout, told.stderr[-2000:]
