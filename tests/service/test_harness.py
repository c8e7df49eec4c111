"""Benchmarks: the real lm-evaluation-harness on local tasks, and on MMLU by its name, against the real app of tiny models."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from servicekit import serving

from service import evaluationreport
from service.harness import Asked, _compared, _listen, run_benchmarks
from tests.conftest import make_tiny
from tests.hub import hub
from trainers.errors import Unavailable, UserError
from trainers.records import EvaluationRecord

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra [eval] is not installed")

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@needs_harness
def test_a_local_task_is_run_on_both_models(tmp_path: Path, tiny: Path) -> None:
    from serve.app import application
    from serve.chats import Chats
    from serve.transformers_engine import TransformersEngine

    rows = [{"question": "the quick brown", "choices": [" fox", " dog"], "label": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK)
    said: list[str] = []
    models = Asked("base", tiny), Asked("tuned", tiny)
    with serving(application(TransformersEngine(tiny), Chats(tiny), "tiny", "key")) as port:
        url = f"http://127.0.0.1:{port}/v1"
        (row,) = run_benchmarks(url, "key", *models, [str(tmp_path / "task.yaml")], said.append, unseen)
        assert (row.task, row.metric, row.base, row.tuned) == (
            "tiny_choice",
            "acc,none",
            0.5,
            0.5,
        )  # the same question, each answer half the time
        assert row.base_error is not None and len(said) == 2
        with pytest.raises(Unavailable, match=r"failed on task\.yaml") as caught:
            run_benchmarks(url, "wrong-key", *models, [str(tmp_path / "task.yaml")], said.append, unseen)
        assert "wrong-key" not in str(caught.value) and "The serving token is missing or wrong." in caught.value.message
        with pytest.raises(Unavailable, match=r"failed on no_such_task: ValueError: Tasks not found") as caught:
            run_benchmarks(url, "key", *models, ["no_such_task"], said.append, unseen)  # a name, which only the harness knows
        assert "`lm_eval ls tasks`" in caught.value.remedy
    record = EvaluationRecord(tasks=[], seconds=0, benchmarks=[row])
    assert evaluationreport.lines(record) == ["tiny_choice: acc,none base 0.5, tuned 0.5 (tuned minus base +0)."]
    assert "tiny_choice" in evaluationreport.page(record)


SUBJECTS = [
    *("econometrics", "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics"),
    *("high_school_microeconomics", "high_school_psychology", "human_sexuality", "professional_psychology", "public_relations"),
    *("security_studies", "sociology", "us_foreign_policy"),
]
"""Of MMLU's group mmlu_social_sciences."""
LIMIT = 2
LONG = "Think of " + "one and " * 80 + "nothing else. "
"""More tokens than the tiny models' contexts hold."""


@needs_harness
def test_mmlu_by_its_name(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group whose data come from a hub, on two models that differ in weights, context and how their tokenizers begin a text."""
    from serve.app import application
    from serve.chats import Chats
    from serve.transformers_engine import TransformersEngine

    other = _with_bos(make_tiny(tmp_path / "other", max_position_embeddings=256, hidden_size=64))
    both = Both({name: application(TransformersEngine(at), Chats(at), name, "key") for name, at in (("base", tiny), ("tuned", other))})
    said: list[str] = []
    shown: list[tuple[int, int]] = []
    with hub({"cais/mmlu": _mmlu()}) as place, serving(both) as port:
        for name, value in {"HF_ENDPOINT": place, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        models, url = (Asked("base", tiny), Asked("tuned", other)), f"http://127.0.0.1:{port}/v1"
        rows = run_benchmarks(url, "key", *models, ["mmlu_social_sciences"], said.append, lambda *at: shown.append(at), LIMIT)

    sizes = {f"mmlu_{subject}": min(LIMIT, len(_questions(i))) for i, subject in enumerate(SUBJECTS)}
    whole, *parts = rows
    assert (whole.task, whole.group, whole.metric) == ("mmlu_social_sciences", None, "acc,none")
    assert {row.task for row in parts} == set(sizes) and {row.group for row in parts} == {"mmlu_social_sciences"}
    for of_model in ("base", "tuned"):
        right = {row.task: getattr(row, of_model) * sizes[row.task] for row in parts}
        assert getattr(whole, of_model) == pytest.approx(sum(right.values()) / sum(sizes.values()))
        assert all(value in (0, 1, 2) for value in right.values())
    differences = [row.tuned - row.base for row in parts]
    assert differences == sorted(differences) and differences[0] < differences[-1]

    requests = 4 * sum(sizes.values())  # one for each choice
    assert {name: len(prompts) for name, prompts in both.prompts.items()} == {"base": requests, "tuned": requests}
    assert max(map(len, both.prompts["base"])) == 511 and max(map(len, both.prompts["tuned"])) == 255
    whole_prompts = [prompt for prompt in both.prompts["tuned"] if len(prompt) < 255]
    assert len(whole_prompts) == requests - 4 and {prompt[0] for prompt in whole_prompts} == {1}
    assert not any(1 in prompt for prompt in both.prompts["base"])
    assert said == [
        "mmlu_social_sciences: asking base",
        "4 prompts are longer than the context of base (512 tokens): their beginnings were cut off.",
        "mmlu_social_sciences: asking tuned",
        "4 prompts are longer than the context of tuned (256 tokens): their beginnings were cut off.",
    ]
    assert shown.count((requests, requests)) >= 2 and {total for _, total in shown} == {requests}


class Both:
    """Two apps behind one address, chosen by a request's `model`, as the gateway does."""

    def __init__(self, apps: dict[str, Any]) -> None:
        self.apps = apps
        self.prompts: dict[str, list[list[int]]] = {name: [] for name in apps}
        """Model -> the ids that were sent."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.apps["base"](scope, receive, send)
        body = b""
        while (message := await receive()).get("more_body") or message.get("body"):
            body += message["body"]
            if not message.get("more_body"):
                break
        asked = json.loads(body)
        self.prompts[asked["model"]] += asked["prompt"]

        async def again() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        await self.apps[asked["model"]](scope, again, send)


def _with_bos(folder: Path) -> Path:
    """Its tokenizer begins every text with a token (id 1), as those of Llama and Gemma do."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _questions(number: int) -> list[dict[str, Any]]:
    """One to three sums of a subject, with the right one of four answers."""
    long = LONG if number == 0 else ""
    sums = [(number, i) for i in range(1 + number % 3)]
    return [
        {
            "question": f"{long}What is {a} plus {b}?",
            "subject": SUBJECTS[number],
            "choices": [str(a + b + i - right) for i in range(4)],
            "answer": right,
        }
        for a, b in sums
        for right in [(a + b) % 4]
    ]


def _mmlu() -> dict[str, bytes]:
    """Files of a dataset of the same layout as MMLU's."""
    files, configs, infos = {}, [], []
    kinds = {"names": {str(i): letter for i, letter in enumerate("ABCD")}}
    types = {
        "question": {"dtype": "string"},
        "subject": {"dtype": "string"},
        "choices": {"sequence": "string"},
        "answer": {"dtype": {"class_label": kinds}},
    }
    for number, subject in enumerate(SUBJECTS):
        for split in ("test", "validation", "dev"):
            data = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(_questions(number)), data)
            files[f"{subject}/{split}-00000-of-00001.parquet"] = data.getvalue()
        at = [{"split": split, "path": f"{subject}/{split}-*"} for split in ("test", "validation", "dev")]
        configs.append({"config_name": subject, "data_files": at})
        infos.append({"config_name": subject, "features": [{"name": name, **type} for name, type in types.items()]})
    card = yaml.safe_dump({"configs": configs, "dataset_info": infos}, sort_keys=False)
    return {**files, "README.md": f"---\n{card}---\n".encode()}


@needs_harness
def test_a_hub_that_does_not_answer(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    models = Asked("base", tiny), Asked("tuned", tiny)
    told = r"The data of mmlu_anatomy are not on this machine yet, and the hub \(http://127\.0\.0\.1:9\) does not answer\."
    with pytest.raises(Unavailable, match=told) as caught:
        run_benchmarks("http://127.0.0.1:9/v1", "key", *models, ["mmlu_anatomy"], print, unseen)
    assert "HF_ENDPOINT" in caught.value.remedy


def test_whoever_stops_it_stops_the_harness(tmp_path: Path) -> None:
    """A stand-in for the harness that says its own process id, as a bar's total, and then goes on."""
    code = "import os, sys, time; print(f'Requesting API:   1%|x| 1/{os.getpid()} [', file=sys.stderr, flush=True); time.sleep(600)"
    at: list[int] = []

    def stop(done: int, total: int) -> None:
        at.append(total)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _listen([sys.executable, "-c", code], tmp_path, dict(os.environ), stop)
    with pytest.raises(ProcessLookupError):
        os.kill(at[0], 0)


def test_the_cause_is_what_came_first(tmp_path: Path) -> None:
    """A stand-in that says what the harness has been seen to say: requests that fail since another one was refused."""
    said = [
        """WARNING [x] API request failed! Status code: 400, Response text: {"error": {"message": "Too long."}}. Retrying...""",
        "aiohttp.client_exceptions.ClientResponseError: 400, message='Bad Request', url='http://x'",
        "RuntimeError: Session is closed",
        "aiohttp.client_exceptions.ClientConnectionError: Connector is closed",
        "aiohttp.client_exceptions.ServerDisconnectedError: Server disconnected",
    ]
    for lines, cause in (
        (said, "Too long."),
        (said[2:], said[-1]),
        ([*said[:1], "ValueError: x"], "ValueError: x"),
        ([], "it said nothing"),
    ):
        code = f"import sys; sys.stderr.write({''.join(line + chr(10) for line in lines)!r}); sys.exit(1)"
        done = _listen([sys.executable, "-c", code], tmp_path, dict(os.environ), unseen)
        assert (done.code, done.cause) == (1, cause)


def test_rows_and_their_report() -> None:
    """What was asked for first, then its groups, then their parts, what was forgotten most first; a terminal shows only those of them."""
    subjects = {f"m_{i}": (0.5, 0.5 - i / 100) for i in range(12)}
    scores = {**subjects, "m_low": (0.5, 0.4), "m_high": (0.5, 0.6), "m": (0.5, 0.45)}
    groups = {"m": ["m_high", "m_low"], "m_low": [f"m_{i}" for i in range(6)], "m_high": [f"m_{i}" for i in range(6, 12)]}
    base, tuned = (
        {"results": {task: {"alias": task, "acc,none": both[i], "acc_stderr,none": 0.03 + 0.01 * i} for task, both in scores.items()}}
        for i in (0, 1)
    )
    rows = _compared({**base, "group_subtasks": groups}, tuned)
    assert [row.task for row in rows] == ["m", "m_low", "m_high", *(f"m_{i}" for i in reversed(range(12)))]
    assert [row.group for row in rows[:4]] == [None, "m", "m", "m_high"]
    record = EvaluationRecord(tasks=[], seconds=0, benchmarks=rows)
    assert evaluationreport.lines(record) == ["m: acc,none base 0.5, tuned 0.45 (tuned minus base -0.05)."]
    text = io.StringIO()
    Console(width=110, file=text).print(evaluationreport.renderable(record))
    shown = text.getvalue()
    assert "2 parts that were forgotten less" in shown
    assert [f" {row.task} " in shown for row in rows] == [True] * 13 + [False] * 2
    page = evaluationreport.page(record)
    assert all(f"<td>{row.task}</td>" in page for row in rows) and ">0.05<" in page  # the errors 0.03 and 0.04 together


def test_of_a_perplexity_less_is_better() -> None:
    base, tuned = ({"results": {"p": {"word_perplexity,none": n}, "q": {"word_perplexity,none": 30.0}}} for n in (20.0, 25.0))
    known = {"group_subtasks": {"g": ["p", "q"]}, "higher_is_better": {t: {"word_perplexity": False} for t in "pq"}}
    rows = _compared({**base, **known}, tuned)
    assert [(row.task, row.gain) for row in rows] == [("p", -5.0), ("q", 0.0)]  # what was forgotten most comes first
    record = EvaluationRecord(tasks=[], seconds=0, benchmarks=[row.model_copy(update={"group": None}) for row in rows])
    assert evaluationreport.lines(record)[0].startswith("p: word_perplexity,none (less is better) base 20, tuned 25")


def test_what_is_not_there_is_refused(tmp_path: Path, tiny: Path) -> None:
    models = Asked("base", tiny), Asked("tuned", tmp_path / "elsewhere")
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="no task file"):
        run_benchmarks("http://127.0.0.1:9", "k", *models, [str(tmp_path / "gone.yaml")], print, unseen)
    with pytest.raises(UserError, match="tokenizer of tuned is not on this machine"):
        run_benchmarks("http://127.0.0.1:9", "k", *models, ["mmlu"], print, unseen)


def unseen(done: int, total: int) -> None:
    pass
