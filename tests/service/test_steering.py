"""`tuneyard pause`, `resume`, `resize` and `samples`: a job steered from the command line while it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import Tuneyard, begun, messages
from servicekit import BASE, wait_for
from tokenizers import Tokenizer

from trainers.records import RunDir, SampleRecord


@pytest.fixture(scope="module")
def tuneyard(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Tuneyard]:
    tuneyard = Tuneyard(tmp_path_factory.mktemp("home"))
    shutil.copytree(tiny, tuneyard.home / "models" / BASE)
    tuneyard.up()
    yield tuneyard
    tuneyard.close()


def test_a_job_is_paused_resized_and_resumed(tuneyard: Tuneyard) -> None:
    client = tuneyard.client()
    job = begun(client, steps=12, hold=5)
    assert tuneyard("pause", job) == f"{job} is pausing.\n"
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job).status == "paused")
    assert json.loads(tuneyard("pause", job, "--json"))["status"] == "paused"
    assert tuneyard("resize", job, "1") == f"{job} goes on with 1 worker(s).\n"
    assert json.loads(tuneyard("resize", job, "1", "--json"))["workers"] == 1
    assert json.loads(tuneyard("resume", job, "--json"))["status"] == "queued"
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job).finished_at)

    done = client.fine_tuning.jobs.retrieve(job)
    assert done.status == "succeeded" and done.trained_tokens == 120
    records = [r for _, found in RunDir(tuneyard.home / "runs" / job).step_segments() for r in found]
    assert [r.step for r in records] == list(range(1, 13)) and {r.attempt for r in records} == {1, 2}
    told = messages(client, job)
    for line in ("The job is paused and has left the cluster.", "Asked to train with 1 worker(s).", "The job was resumed."):
        assert line in told, told


def test_a_job_that_runs_is_resized_in_its_next_attempt(tuneyard: Tuneyard) -> None:
    client = tuneyard.client()
    job = begun(client, steps=12, hold=5)
    assert tuneyard("resume", job) == f"{job} is running.\n"  # it never stopped
    assert tuneyard("resize", job, "1") == f"{job} goes on with 1 worker(s).\n"
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job).finished_at)
    assert client.fine_tuning.jobs.retrieve(job).status == "succeeded" and "Attempt 2 started." in messages(client, job)


@pytest.mark.parametrize("words", [("pause",), ("resume",), ("resize", "1")], ids=lambda words: words[0])
def test_what_is_over_or_never_was_is_one_line_of_cause_and_one_of_remedy(tuneyard: Tuneyard, words: tuple[str, ...]) -> None:
    client = tuneyard.client()
    job = begun(client, steps=12, hold=5)
    client.fine_tuning.jobs.cancel(job)
    command, *more = words
    for name, said in ((job, "already cancelled"), ("ftjob-none", "There is no fine-tuning job `ftjob-none`")):
        told = tuneyard(command, name, *more, code=1)
        assert said in told and len(told.splitlines()) <= 2 and "Traceback" not in told


def test_workers_that_cannot_be(tuneyard: Tuneyard) -> None:
    client = tuneyard.client()
    job = begun(client, steps=12, hold=5)
    assert "`workers` is 1000, but the cluster has" in tuneyard("resize", job, "1000", code=1)
    for words, said in (("0",), "or equal to 1"), (("many",), "valid integer"), ((), "Missing argument"):
        assert said in tuneyard("resize", job, *words, code=2)
    assert client.fine_tuning.jobs.cancel(job).status == "cancelled"


def test_samples_are_shown_example_by_example(tuneyard: Tuneyard, tiny: Path) -> None:
    client = tuneyard.client()
    job = begun(client, steps=12, hold=5)
    assert "Nothing yet" in tuneyard("samples", job) and json.loads(tuneyard("samples", job, "--json")) == []
    encode = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode
    prompt, right, wrong = (encode(text).ids for text in ("the [fox]?", "jumps", "the the"))
    run = RunDir(tuneyard.home / "runs" / job, 1, "train")
    for step, answer in ((5, wrong), (10, right)):
        run.append(
            "samples", [SampleRecord(step=step, example=n, prompt_ids=prompt, answer_ids=answer, reference_ids=right) for n in (3, 1)]
        )
    lines = ["example 1: the [fox]?", "  reference: jumps", "  step 5: the the", "  step 10: jumps"]
    assert tuneyard("samples", job).splitlines() == [*lines, lines[0].replace("1", "3"), *lines[1:]]
    found = json.loads(tuneyard("samples", job, "--json"))
    assert [(sample["step"], sample["example"], sample["answer"]) for sample in found if sample["example"] == 3] == [
        (5, 3, "the the"),
        (10, 3, "jumps"),
    ]
    assert "There is no fine-tuning job `ftjob-none`" in tuneyard("samples", "ftjob-none", code=1)
    client.fine_tuning.jobs.cancel(job)
