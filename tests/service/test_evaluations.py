"""/v1/tuneyard/evaluations and `tuneyard eval` on real Ray and Ray Serve, with a tiny base and a random adapter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from servicekit import BASE, Service, service_on, wait_for

from cluster import local
from service import evaluations
from service.evaluations import MOST_ATTEMPTS, Evaluation, Evaluations
from service.link import Link
from service.order import EvaluationOrder
from service.runner import Runner
from service.store import Job, new_id
from tests.serve.conftest import make_adapter
from trainers.catalogue import catalogue
from trainers.records import EvaluationRecord, Lease, ModelRecord, OutcomeRecord, RunDir
from trainers.spec import JobSpec

ROOT = Path(__file__).parents[2]
PATH = "/tuneyard/evaluations"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.LocalHead]:
    home = tmp_path_factory.mktemp("ray")
    head = local.start(home, num_cpus=1, path=str(ROOT))
    yield head
    local.stop(home)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, head: local.LocalHead, tiny: Path) -> Iterator[Service]:
    """A service on a cluster, with its runner at work."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny, home / "models" / BASE)
    with head.client() as ray, service_on(home, Link(ray, "127.0.0.1", head.serve_port), chat_wait_s=90.0) as service:
        stop = threading.Event()
        thread = threading.Thread(target=Runner(service.settings, service.store, service.link).run, args=(stop,))
        thread.start()
        yield service
        stop.set()
        thread.join()


def get(client: OpenAI, path: str) -> Any:
    return client.get(path, cast_to=object)


def post(client: OpenAI, path: str, body: Any = None) -> Any:
    return client.post(path, cast_to=object, body=body)


def tuned(service: Service, client: OpenAI) -> str:
    """A succeeded job whose model is a random adapter; the model's name. It is put into the database as it is: on its way there the
    runner, which is at work, would take it up."""
    owner = service.store.project_of(client.api_key)
    assert owner is not None
    spec = JobSpec.parse({"model": {"base": BASE}, "data": {"train": [{"path": "unread"}]}}).model_dump(mode="json")
    id = new_id("ftjob-")
    name = f"ft:{BASE}:{owner.name}::{id.removeprefix('ftjob-')}"
    run = RunDir(service.settings.runs / id, 1, "driver")
    make_adapter(service.settings.models / BASE, run.path("adapters", "step-000003"), seed=1)
    run.write("model.json", ModelRecord(base=BASE, adapter="adapters/step-000003", merged=None, step=3))
    job = Job(
        id=id, project_id=owner.id, status="succeeded", request={}, spec=spec, base=BASE, model_name=name, created_at=time.time(),
        result_files=[], attempt=1, released=True,
    )  # fmt: skip
    service.store.add_job(job)
    return name


LIKELY = """
task: likely
dataset_path: json
dataset_kwargs: {data_files: {test: likely.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{begin}}"
doc_to_target: "{{end}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""


def rows(count: int = 6) -> bytes:
    questions = ("the quick", "lazy dog", "brown fox")
    made = [{"prompt": f"{questions[i % 3]} {i}", "completion": "jumps", "kind": "even" if i % 2 == 0 else "odd"} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def over(client: OpenAI, id: str) -> Any:
    return wait_for(lambda: found if (found := get(client, f"{PATH}/{id}"))["status"] not in evaluations.OPEN else None, 900)


def test_an_evaluation_from_start_to_report(live: Service) -> None:
    client = live.client("acme", timeout=600)
    model = tuned(live, client)
    file = client.files.create(file=("held-out.jsonl", rows()), purpose="fine-tune").id
    body = {"model": model, "tasks": [{"path": file, "metric": "contains", "max_tokens": 8}], "slice_by": "kind"}
    made = post(client, PATH, body)
    assert (made["status"], made["model"], made["against"], made["tasks"]) == ("queued", model, BASE, ["held-out.jsonl"])
    found = over(client, made["id"])
    folder = evaluations.folder(live.settings, made["id"])
    assert found["status"] == "succeeded", (found["error"], *(log.read_text()[-2000:] for log in folder.glob("logs/*")))
    record = EvaluationRecord.model_validate(found["result"])
    assert (record.base, record.tuned) == (BASE, model)
    (task,) = record.tasks
    assert task.examples == 6 and set(task.slices) == {"even", "odd"} and task.failed_requests == {"base": 0, "tuned": 0}
    assert task.samples[0]["base"] != task.samples[0]["tuned"]
    assert record.loss is not None and record.loss.base != record.loss.tuned
    assert found["progress"] == {"done": 24, "total": 24}  # 6 cases, answered and scored, by two models

    answers = [json.loads(line) for line in client.get(f"{PATH}/{made['id']}/answers", cast_to=str).splitlines()]
    assert [row["id"] for row in answers] == [f"held-out.jsonl:{i}" for i in range(1, 7)]
    report = client.get(f"{PATH}/{made['id']}/report", cast_to=str)
    assert "<svg" in report and model in report and "http" not in report.split("</style>")[1].replace("http://www.w3.org", "")
    assert [row["id"] for row in get(client, PATH)["data"]] == [made["id"]]

    stranger = live.client("other")
    assert get(stranger, PATH)["data"] == []
    for path in (made["id"], f"{made['id']}/answers", f"{made['id']}/report"):
        with pytest.raises(openai.NotFoundError):
            get(stranger, f"{PATH}/{path}")
    with pytest.raises(openai.BadRequestError, match="is over"):
        post(client, f"{PATH}/{made['id']}/cancel")


def test_the_command_line(live: Service, tuneyard: list[str], tmp_path: Path) -> None:
    key = live.key("cli")
    client = OpenAI(base_url=live.base_url, api_key=key)
    live.clients.append(client)
    model = tuned(live, client)
    (tmp_path / "held-out.jsonl").write_bytes(rows(4))
    (tmp_path / "tasks.yaml").write_text("- {path: held-out.jsonl, metric: regex, pattern: '[a-z]', max_tokens: 4, name: letters}\n")
    (tmp_path / "own_metric.py").write_text("def short(answer, reference):\n    return {'short': len(answer) < 100, 'any': 1}\n")
    environment = {**os.environ, "OPENAI_BASE_URL": live.base_url, "OPENAI_API_KEY": key, "PYTHONPATH": str(ROOT)}
    command = [
        *tuneyard,
        "eval",
        model,
        "--task",
        "tasks.yaml",
        "--code",
        "own_metric:short",
        "--json",
        "-o",
        "report.html",
        "-o",
        "r.json",
    ]
    done = subprocess.run(
        [*command, "--home", str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert [task["name"] for task in told["tasks"]] == ["letters", "letters by own_metric:short"]
    assert told["tasks"][1]["tuned"] == {"short": 1.0, "any": 1.0} and told["tasks"][1]["metric"] == "short"

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        full = [*tuneyard, "eval", *more, "--home", str(tmp_path)]
        return subprocess.run(full, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False)

    nobody = run(told["id"], "--judge", "http://127.0.0.1:9/v1", "umpire")
    assert nobody.returncode == 1 and "answered none" in nobody.stderr and "letters" in nobody.stdout  # what was measured is told
    (tmp_path / "typo.yaml").write_text("{path: held-out.jsonl, metrc: regex}\n")
    typo = run(model, "--task", "typo.yaml")
    assert typo.returncode == 1 and "typo.yaml: `metrc` is not a key of a task" in typo.stderr and "`metric`" in typo.stderr
    (tmp_path / "empty.jsonl").write_text('{"messages": []}\n')
    assert "eval_" not in (empty := run(model, "--task", "empty.jsonl")).stderr and empty.returncode == 1
    sliced = run(model, "--task", "held-out.jsonl", "--slice-by", "nope")
    assert sliced.returncode == 1 and "No row of the tasks has `nope`" in sliced.stderr and "eval_" not in sliced.stderr
    assert json.loads((tmp_path / "r.json").read_text()) == told
    assert "letters by own_metric:short" in (tmp_path / "report.html").read_text()
    assert f"`tuneyard eval {told['id']}` comes back to it" in " ".join(done.stderr.split())
    again = [*tuneyard, "eval", told["id"], "--home", str(tmp_path)]
    (tmp_path / "likely.jsonl").write_text(json.dumps({"begin": "the quick brown", "end": " fox"}) + "\n")
    (tmp_path / "likely.yaml").write_text(LIKELY)
    here = {**environment, "TUNEYARD_MODELS": str(live.settings.models)}  # where the tokenizers of both models are
    command = [*again, "--json", "--benchmark", "likely.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["tasks"] == told["tasks"][:1]
    (benchmark,) = json.loads(done.stdout)["benchmarks"]
    assert (benchmark["task"], benchmark["metric"]) == ("likely", "perplexity,none") and benchmark["base"] != benchmark["tuned"]
    assert f"likely.yaml: asking {BASE}" in done.stderr and f"likely.yaml: asking {model}" in done.stderr
    wrong = [*again, "--metric", "regex"]
    done = subprocess.run(wrong, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 2 and "already takes only" in done.stderr
    count = len(get(client, PATH)["data"])
    wrong = [*tuneyard, "eval", model, "--task", "tasks.yaml", "--code", "own_metric:gone", "--home", str(tmp_path)]
    done = subprocess.run(wrong, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 1 and "own_metric:gone` cannot be loaded" in done.stderr
    assert len(get(client, PATH)["data"]) == count  # before anything is asked


def test_a_lost_attempt_is_tried_again_and_a_cancelled_one_is_fenced(live: Service) -> None:
    """Rows of a model that nobody serves: the attempts wait until they are killed."""
    client = live.client("lost")
    project = client.files.create(file=("x.jsonl", rows()), purpose="fine-tune")
    side = {"name": BASE, "app": "ftjob-nobody", "folder": str(live.settings.models / BASE)}
    order = {"base": side, "tuned": side, "tasks": [{"path": project.id, "name": "x"}]}
    owner = live.store.project_of(client.api_key)
    assert owner is not None
    row = Evaluation(
        id=new_id("eval_"), project_id=owner.id, status="queued", model=BASE, against=BASE, order=order, created_at=time.time()
    )  # fmt: skip
    evaluations.add(live.store, row)
    run = RunDir(evaluations.folder(live.settings, row.id))

    def at_work(attempt: int) -> bool:
        now = evaluations.get(live.store, owner.id, row.id)
        assert now is not None
        return now.attempt == attempt and now.submitted and run.path("progress.json").exists()

    wait_for(lambda: at_work(1), 300)
    live.link.ray.stop(f"{row.id}-1")
    wait_for(lambda: at_work(2), 300)
    lease = run.read("lease.json", Lease)
    assert lease is not None and lease.attempt == 2
    assert post(client, f"{PATH}/{row.id}/cancel")["status"] == "cancelled"

    def released() -> bool:
        now, held = evaluations.get(live.store, owner.id, row.id), run.read("lease.json", Lease)
        return now is not None and not now.submitted and held is not None and held.attempt == 3

    wait_for(released, 300)
    wait_for(lambda: live.link.ray.state(f"{row.id}-2")[0] != "alive", 300)
    assert run.read("outcome.json", OutcomeRecord) is None


def test_what_cannot_be_evaluated_is_refused(service: Service) -> None:
    client = service.client()
    file = client.files.create(file=("x.jsonl", rows()), purpose="fine-tune").id
    task = {"path": file}
    for body, status, told in (
        ({"model": "ft:nobody"}, 404, "no model"),
        ({"model": BASE, "tasks": [task]}, 400, "is a base model"),
        ({"model": BASE, "against": BASE}, 400, "nothing to evaluate on"),
        ({"model": BASE, "against": BASE, "tasks": [{"path": "/etc/passwd"}]}, 400, "not a file of this project"),
        ({"model": BASE, "against": BASE, "tasks": [{**task, "metric": "regex"}]}, 400, "belong together"),
        ({"model": BASE, "against": BASE, "tasks": [task], "judge": {"model": "m", "url": "http://169.254.169.254/v1"}}, 400, "no judge"),
        ({"model": BASE, "against": BASE, "tasks": [task], "code": "os:system"}, 400, "code"),
    ):
        with pytest.raises(openai.APIStatusError, match=told) as caught:
            post(client, PATH, body)
        assert caught.value.status_code == status, body


def test_a_judge_elsewhere_is_the_owners_to_grant(tmp_path: Path) -> None:
    with service_on(tmp_path, judge_urls="https://judge.example/v1") as service:
        client = service.client()
        file = client.files.create(file=("x.jsonl", rows()), purpose="fine-tune").id
        body: dict[str, Any] = {"model": BASE, "against": BASE, "tasks": [{"path": file}]}
        made = post(client, PATH, {**body, "judge": {"model": "m", "url": "https://judge.example/v1"}})
        assert made["status"] == "queued"
        with pytest.raises(openai.BadRequestError, match="no judge"):
            post(client, PATH, {**body, "judge": {"model": "m", "url": "https://judge.example.evil/v1"}})
        job = {"evaluate": {"judge": {"model": "m", "url": "http://elsewhere/v1"}}}
        with pytest.raises(openai.BadRequestError, match="no judge"):
            client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body={"job": job})


def test_a_judge_here_is_the_model_that_was_named(service: Service) -> None:
    client = service.client()
    file = client.files.create(file=("x.jsonl", rows()), purpose="fine-tune").id
    body: dict[str, Any] = {"model": BASE, "against": BASE, "tasks": [{"path": file}]}
    other = next(base.id for base in catalogue().values() if base.id != BASE)
    made = post(client, PATH, {**body, "judge": {"model": other}})
    owner = service.store.project_of(client.api_key)
    assert owner is not None
    row = evaluations.get(service.store, owner.id, made["id"])
    assert row is not None
    order = EvaluationOrder.model_validate(row.order)
    assert order.judging is not None and order.judging.app == other
    assert [side.app for side in order.sides] == [BASE, BASE, other]
    with pytest.raises(openai.NotFoundError, match="no base model `umpire`"):
        post(client, PATH, {**body, "judge": {"model": "umpire"}})
    job = {"evaluate": {"judge": {"model": other}}}
    with pytest.raises(openai.BadRequestError, match="the base itself judges"):
        client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body={"job": job})


def test_an_evaluation_that_is_always_lost_gives_up(own_service: Service) -> None:
    """No cluster here: the state is what the runner's part makes of what it is told."""
    client = own_service.client("p")
    owner = own_service.store.project_of(client.api_key)
    assert owner is not None
    side = {"name": BASE, "app": BASE, "folder": ""}
    row = Evaluation(
        id=new_id("eval_"), project_id=owner.id, status="running", model=BASE, against=BASE, created_at=time.time(),
        order={"base": side, "tuned": side, "tasks": []}, attempt=MOST_ATTEMPTS, submitted=True,
    )  # fmt: skip
    evaluations.add(own_service.store, row)

    class Gone:
        def state(self, submission: str) -> tuple[str, str]:
            return "absent", "the cluster does not know it"

    link = Link(Gone(), "127.0.0.1", 9)  # type: ignore[arg-type]
    Evaluations(own_service.settings, own_service.store, link).step()
    found = get(client, f"{PATH}/{row.id}")
    assert found["status"] == "failed" and f"lost {MOST_ATTEMPTS} times" in found["error"]["message"]
