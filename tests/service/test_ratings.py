"""Human evaluation over HTTP: studies are made and answered, links open one study each, ratings become results and preference pairs."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from servicekit import BASE, Service, service_on, serving, wait_for
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cluster.ray_rest import RayRest
from service import cli, evaluations
from service.evaluations import Evaluation
from service.link import Link
from service.store import Store
from service.studies import SCALES, Studies, StudyItem

STUDIES = "/tuneyard/studies"
ALIAS = "gpt-4o-mini"


class Models:
    """In the place of Ray Serve and its apps: answers with the model's name and the question."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.broken = False
        self.refused = ""
        self.cut = ""
        """The model whose answers have no end."""
        self.let = threading.Event()
        self.let.set()

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{app}/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        while not self.let.is_set():
            await asyncio.sleep(0.01)
        self.at_once -= 1
        if self.broken:
            return JSONResponse({"error": {"message": "out of order", "type": "server_error", "param": None, "code": None}}, 500)
        question = body["messages"][-1]["content"]
        if self.refused and self.refused in question:
            return JSONResponse({"error": {"message": "too long", "type": "invalid_request_error", "param": None, "code": None}}, 400)
        text = "the same" if "same" in question else f"{body['model']} on {question}"
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if body.get("tools"):
            call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "map"}'}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        finish = "length" if body["model"] == self.cut else "stop"
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return JSONResponse({"id": "c", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]})


@pytest.fixture
def models() -> Models:
    return Models()


@contextmanager
def answering(home: Path, models: Models) -> Iterator[Service]:
    with serving(models.app()) as port, service_on(home, Link(RayRest("http://127.0.0.1:9"), "127.0.0.1", port)) as service:
        yield service


def upload(client: OpenAI, rows: list[Any] | bytes, name: str = "rows.jsonl") -> str:
    content = rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows)).encode()
    return client.files.create(file=(name, content), purpose="evals").id


def create(client: OpenAI, rows: list[Any] | bytes, **body: Any) -> Any:
    return client.post(STUDIES, cast_to=object, body={"file": upload(client, rows), **body})


def get(client: OpenAI, study: Any, what: str = "") -> Any:
    return client.get(f"{STUDIES}/{study['id']}{what}", cast_to=object)


def given(num: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "answers": {"new": f"new {n}", "old": f"old {n}"}, **more} for n in range(num)]


class Page:
    """A rater, speaking as the page's script does."""

    def __init__(self, link: str, name: str) -> None:
        url, _, token = link.partition("#")
        self.http = httpx.Client(base_url=f"{url}/", headers={"authorization": f"Bearer {token}"})
        joined = self.http.post("raters", json={"name": name})
        assert joined.status_code == 200, joined.text
        self.total, self.at = joined.json()["total"], f"raters/{joined.json()['rater']}"

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def unit(self, number: int) -> dict[str, Any]:
        return self.http.get(f"{self.at}/units/{number}").json()

    def put(self, number: int, body: Any) -> httpx.Response:
        return self.http.put(f"{self.at}/units/{number}", json=body)

    def choose(self, model: str, only: str = "") -> None:
        """Rate every unit (with `only`: whose question has it): prefer the answer that begins with `model`, or `tie`, `both_bad`."""
        for number in range(1, self.total + 1):
            unit = self.unit(number)
            if only in unit["conversation"][-1]["text"]:
                sides = {answer.split()[0]: side for answer, side in zip(unit["answers"], ("left", "right"), strict=True)}
                assert self.put(number, {"choice": sides.get(model, model)}).status_code == 200


# -- answers ---------------------------------------------------------------------------------------------------------


def test_models_are_asked_through_the_chat_endpoint(tmp_path: Path, models: Models) -> None:
    with answering(tmp_path, models) as service:
        client = service.client("acme")
        rows = [{"prompt": f"q{n}", "topic": "even" if n % 2 == 0 else "odd"} for n in range(20)] + [{"prompt": "the same", "topic": "odd"}]
        models.let.clear()
        study = create(client, rows, models=[BASE, ALIAS], slice_by="topic", max_tokens=64, seed=3)
        assert study["status"] == "generating" and study["items"]["waiting"] == 21
        wait_for(lambda: models.at_once == 8)  # and no more, however many wait
        with httpx.Client(headers={"authorization": f"Bearer {study['link'].partition('#')[2]}"}) as http:
            about = http.get(f"{study['link'].partition('#')[0]}/study").json()
            assert (about["status"], about["answered"], about["items"]) == ("generating", 0, 21)
            assert http.post(f"{study['link'].partition('#')[0]}/raters", json={"name": "Ann"}).status_code == 400
        models.let.set()
        done = wait_for(lambda: (now := get(client, study))["status"] == "ready" and now)
        assert done["items"] == {"total": 21, "waiting": 0, "ready": 20, "identical": 1, "failed": 0} and done["to_rate"] == 20
        assert models.most_at_once == 8 and len(models.asked) == 42
        assert Counter(body["model"] for body in models.asked) == {BASE: 21, ALIAS: 21}
        body = next(body for body in models.asked if body["messages"][-1]["content"] == "q7")
        assert body == {
            "model": body["model"],
            "messages": [{"role": "user", "content": "q7"}],
            "temperature": 0.0,
            "max_tokens": 64,
            "seed": 3,
        }
        with Page(study["link"], "Ann") as ann:
            ann.choose(ALIAS)
        results = get(client, study, "/results")
        assert results["wins"] == {BASE: 0, ALIAS: 20}
        assert {name: part["items"] for name, part in results["slices"].items()} == {"even": 10, "odd": 10}


def test_answers_that_were_cut_off_are_told_and_are_no_example(tmp_path: Path, models: Models) -> None:
    models.cut = ALIAS
    with answering(tmp_path, models) as service:
        client = service.client("acme")
        study = create(client, [{"prompt": "q0"}, {"prompt": "q1"}], models=[BASE, ALIAS])
        done = wait_for(lambda: (now := get(client, study))["status"] == "ready" and now)
        assert done["message"].startswith("2 answers were cut off")
        with Page(study["link"], "Ann") as ann:
            for unit in map(ann.unit, (1, 2)):
                assert unit["cut"] == [answer.startswith(ALIAS) for answer in unit["answers"]] and sum(unit["cut"]) == 1
            ann.choose(ALIAS, "q0")
            ann.choose(BASE, "q1")
        pairs = [json.loads(line) for line in get_text(client, study, "/export").splitlines()]
        assert [pair["preferred_output"][0]["content"] for pair in pairs] == [f"{BASE} on q1"]
        lines = [json.loads(line) for line in get_text(client, study, "/export?form=ratings").splitlines()]
        assert [line["cut"] for line in lines] == [[ALIAS]] * 2 and get(client, study, "/results")["wins"] == {BASE: 1, ALIAS: 1}


def test_the_last_answer_of_a_conversation_is_left_out_and_tools_go_along(tmp_path: Path, models: Models) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    with answering(tmp_path, models) as service:
        client = service.client("acme")
        rows = [
            {
                "messages": [*turns, {"role": "user", "content": "where?"}, {"role": "assistant", "content": "there"}],
                "tools": [tool],
            },
            {"instruction": "Add.", "input": "1 2", "output": "3"},
        ]
        study = create(client, rows, models=[BASE], kind="likert")
        wait_for(lambda: get(client, study)["status"] == "ready")
        asked = {len(body["messages"]): body for body in models.asked}
        assert asked[4]["messages"] == [*turns, {"role": "user", "content": "where?"}] and asked[4]["tools"] == [tool]
        assert asked[1]["messages"] == [{"role": "user", "content": "Add.\n\n1 2"}] and "tools" not in asked[1]
        with Page(study["link"], "Ann") as ann:
            shown = {len(unit["conversation"]): unit["answers"] for unit in map(ann.unit, (1, 2))}
        assert shown == {4: ['look({\n  "at": "map"\n})'], 1: [f"{BASE} on Add.\n\n1 2"]}


def test_what_fails_is_told_and_asked_again(tmp_path: Path, models: Models) -> None:
    with answering(tmp_path, models) as service:
        client = service.client("acme")
        models.refused = "long"
        study = create(client, [{"prompt": "short"}, {"prompt": "long"}], models=[BASE, ALIAS])
        done = wait_for(lambda: (now := get(client, study))["status"] == "ready" and now)
        assert done["items"]["failed"] == 1
        assert re.match(r"1 of 2 items have no answers; rows.jsonl:2: \S+: .*too long", done["message"]), done["message"]
        models.refused = ""
        assert client.post(f"{STUDIES}/{study['id']}/retry", cast_to=object)
        wait_for(lambda: get(client, study)["items"]["ready"] == 2)
        with pytest.raises(openai.BadRequestError, match="No item"):
            client.post(f"{STUDIES}/{study['id']}/retry", cast_to=object)
        models.refused = "long"
        other = create(client, [{"prompt": "long"}], models=[BASE, ALIAS])
        wait_for(lambda: get(client, other)["status"] == "failed")


def test_a_killed_service_goes_on_where_it_was(tmp_path: Path, models: Models) -> None:
    with answering(tmp_path, models) as service:
        client = service.client("acme")
        models.broken = True
        study = create(client, [{"prompt": f"q{n}"} for n in range(3)], models=[BASE, ALIAS])
        wait_for(lambda: "out of order" in get(client, study)["message"])  # it may pass: nothing has failed
        assert get(client, study)["items"]["waiting"] == 3
    store = Store(service.settings.database_url)
    item = Studies(store).items(study["id"])[0]  # one answer came before the end
    Studies(store).answer(item, [{"role": "assistant", "content": "kept"}, None], "waiting")
    store.close()
    models.broken = False
    models.asked.clear()
    with answering(tmp_path, models) as service:
        client = service.client("acme")
        wait_for(lambda: get(client, study)["status"] == "ready")
        kept: StudyItem = Studies(service.store).items(study["id"])[0]
        assert [answer and answer["content"] for answer in kept.answers] == ["kept", f"{ALIAS} on q0"]
        assert len(models.asked) == 5
    with sqlite3.connect(service.settings.home / "tuneyard.db") as database:
        # This test's own two: those that were lent are forgotten.
        assert database.execute("SELECT count(*) FROM keys").fetchone() == (2,)
    database.close()


def test_one_process_holds_a_study(service: Service) -> None:
    study = create(service.client(), given(1))
    store = Studies(service.store)
    store.change(study["id"], status="generating")
    assert store.take("a", 60) and store.take("b", 60) is None and store.take("a", 60) is None
    assert store.hold(study["id"], "a", 60) and not store.hold(study["id"], "b", 60)
    store.hold(study["id"], "a", -1)  # its time is over
    taken = store.take("b", 60)
    assert taken and taken.id == study["id"] and not store.hold(study["id"], "a", 60)
    store.change(study["id"], status="ready")


# -- rating ----------------------------------------------------------------------------------------------------------


def test_three_raters_become_results_and_pairs(service: Service) -> None:
    client = service.client()
    rows = given(4)
    rows[0]["kind"], rows[1]["kind"] = "easy", "hard"
    study = create(client, rows, slice_by="kind")
    assert study["status"] == "ready" and study["models"] == ["new", "old"]
    said = {
        "Ann": ("new", "old", "tie", "new"),
        "Bob": ("new", "old", "both_bad", "old"),
        "Eve": ("new", "new", "both_bad", "tie"),
    }
    for name, choices in said.items():
        with Page(study["link"], name) as page:
            for n, choice in enumerate(choices):
                page.choose(choice, f"question {n}")
    results = get(client, study, "/results")
    assert (results["items"], results["wins"], results["ties"], results["both_bad"]) == (4, {"new": 1, "old": 1}, 1, 1)
    low, high = (pytest.approx(bound, abs=1e-4) for bound in (0.0945, 0.9055))
    assert results["win_rate"]["new"] == {"value": 0.5, "low": low, "high": high, "of": 2}
    assert results["slices"]["easy"]["wins"] == {"new": 1, "old": 0} and results["slices"]["hard"]["wins"] == {"new": 0, "old": 1}
    assert results["agreement"]["method"] == "Fleiss' kappa" and results["agreement"]["raters"] == 3
    assert results["raters"] == {"Ann": 4, "Bob": 4, "Eve": 4}
    lines = [json.loads(line) for line in get_text(client, study, "/export").splitlines()]
    assert lines == [
        {
            "input": {"messages": [{"role": "user", "content": f"question {n}"}]},
            "preferred_output": [{"role": "assistant", "content": f"{best} {n}"}],
            "non_preferred_output": [{"role": "assistant", "content": f"{worst} {n}"}],
        }
        for n, best, worst in ((0, "new", "old"), (1, "old", "new"))
    ]
    each = [json.loads(line) for line in get_text(client, study, "/export?form=ratings").splitlines()]
    assert Counter((line["rater"], line["choice"]) for line in each)["Eve", "new"] == 2
    assert {line["left"] for line in each} <= {"new", "old"}


def get_text(client: OpenAI, study: Any, what: str) -> str:
    return client.get(f"{STUDIES}/{study['id']}{what}", cast_to=str)


def test_grades_become_means_and_pairs(service: Service) -> None:
    client = service.client()
    study = create(client, given(3), kind="likert")
    for name, better in (("Ann", 5), ("Bob", 4)):
        with Page(study["link"], name) as page:
            assert page.total == 6
            for number in range(1, 7):
                [answer] = page.unit(number)["answers"]
                grade = 3 if answer.endswith("2") else better if answer.startswith("new") else 1
                assert page.put(number, {"helpfulness": grade, "harmlessness": 5, "honesty": 3}).status_code == 200
    results = get(client, study, "/results")
    assert results["grades"]["new"]["helpfulness"]["mean"] == 4 and results["grades"]["old"]["helpfulness"]["mean"] == pytest.approx(5 / 3)
    assert results["grades"]["old"]["helpfulness"]["grades"] == {"1": 4, "2": 0, "3": 2, "4": 0, "5": 0}
    assert results["difference"]["helpfulness"]["mean"] == pytest.approx(7 / 3) and results["difference"]["honesty"]["mean"] == 0
    assert results["agreement"]["helpfulness"]["method"] == "Cohen's kappa, quadratic weights"
    assert results["agreement"]["honesty"]["kappa"] is None and results["agreement"]["honesty"]["same_choice"] == 1
    pairs = get_text(client, study, "/export").splitlines()
    assert [json.loads(pair)["preferred_output"][0]["content"] for pair in pairs] == ["new 0", "new 1"]  # the third is a tie
    alone = create(client, given(1), kind="likert", models=["old"])
    with pytest.raises(openai.BadRequestError, match="one model"):
        get_text(client, alone, "/export")


def test_order_is_random_per_rater_stays_and_is_told_to_nobody(service: Service) -> None:
    client = service.client()
    study = create(client, given(200))
    seen = []
    for name in ("Ann", "Bob"):
        with Page(study["link"], name) as page:
            units = [page.http.get(f"{page.at}/units/{n}") for n in range(1, 41)]
            assert not any(re.search(r'"(new|old)"', unit.text) for unit in units)
            order = [unit.json()["conversation"][0]["text"] for unit in units]
            left = [unit.json()["answers"][0].startswith("new") for unit in units]
            seen.append((order, left))
            assert [page.unit(n)["conversation"][0]["text"] for n in (1, 20)] == [order[0], order[19]]
            assert 5 < sum(left) < 35 and len(set(order)) == 40  # by chance in 4 of a million runs
    assert seen[0] != seen[1]
    with Page(study["link"], "ann ") as again:  # the same person
        assert again.unit(1)["conversation"][0]["text"] == seen[0][0][0]


def test_ratings_change_until_the_rater_has_finished(service: Service) -> None:
    client = service.client()
    study = create(client, given(2))
    with Page(study["link"], "Ann") as page:
        assert page.put(1, {"choice": "left"}).json() == {"total": 2, "rated": 1, "next": 2, "finished": False}
        assert page.unit(1)["mine"] == {"choice": "left"}
        assert page.put(1, {"choice": "right"}).status_code == 200 and page.unit(1)["mine"] == {"choice": "right"}
        early = page.http.post(f"{page.at}/finish")
        assert early.status_code == 400 and "1 of 2" in early.json()["error"]["message"] and "revealed" not in page.unit(1)
        page.choose("new")
        told = page.http.post(f"{page.at}/finish").json()
        assert told["revealed"] == [{"model": "new", "preferred": 2}, {"model": "old", "preferred": 0}]
        assert page.put(1, {"choice": "tie"}).status_code == 400
    assert get(client, study)["raters"] == [{"name": "Ann", "rated": 2, "finished": True}]
    with Page(study["link"], "Bob") as page:
        client.post(f"{STUDIES}/{study['id']}/close", cast_to=object)
        assert page.put(1, {"choice": "tie"}).status_code == 400
        assert page.http.post("raters", json={"name": "Eve"}).status_code == 400
    with pytest.raises(openai.BadRequestError, match="being rated"):
        client.post(f"{STUDIES}/{study['id']}/retry", cast_to=object)


@pytest.mark.parametrize(
    "body",
    [{}, [], *({"choice": wrong} for wrong in ("A", "0", None, 1)), {"choice": "left", "model": 1}, dict.fromkeys(SCALES, 1)],
)
def test_ratings_that_are_none_are_refused(service: Service, body: Any) -> None:
    with Page(create(service.client(), given(1))["link"], "Ann") as page:
        assert page.put(1, body).status_code == 400 and page.unit(1)["mine"] is None
        assert page.put(2, {"choice": "tie"}).status_code == 404 and page.put(0, {"choice": "tie"}).status_code == 404


@pytest.mark.parametrize("grade", [0, 6, 3.5, "3", True, None])
def test_grades_go_from_1_to_5(service: Service, grade: Any) -> None:
    with Page(create(service.client(), given(1), kind="likert")["link"], "Ann") as page:
        assert page.put(1, {"helpfulness": grade, "harmlessness": 1, "honesty": 1}).status_code == 400


# -- who may what ----------------------------------------------------------------------------------------------------


def test_a_link_opens_one_study_and_is_no_key(service: Service) -> None:
    client = service.client()
    one, two = create(client, given(1)), create(client, given(1))
    url, _, token = one["link"].partition("#")
    key = service.key()
    with httpx.Client() as http:

        def status(path: str, secret: str) -> int:
            return http.get(path, headers={"authorization": f"Bearer {secret}"}).status_code

        assert status(f"{url}/study", token) == 200
        assert [status(f"{url}/study", secret) for secret in (key, client.api_key, token + "x", two["link"].partition("#")[2])] == [401] * 4
        assert status(f"{two['link'].partition('#')[0]}/study", token) == 401
        assert status(f"{service.base_url}{STUDIES}", token) == 401 and status(f"{service.base_url}/models", token) == 401
        fresh: Any = client.post(f"{STUDIES}/{one['id']}/link", cast_to=object)
        assert status(f"{url}/study", token) == 401 and status(f"{url}/study", fresh["link"].partition("#")[2]) == 200
    kept = (service.settings.home / "tuneyard.db").read_bytes() + (service.settings.home / "tuneyard.db-wal").read_bytes()
    assert fresh["link"].partition("#")[2].encode() not in kept
    assert "link" not in get(client, one) and "secret" not in json.dumps(get(client, one))


def test_another_projects_study_is_not_there(service: Service) -> None:
    mine, other = service.client("mine"), service.client("other")
    study = create(mine, given(1))
    with Page(study["link"], "Ann") as page:
        page.choose("new")
    for call in (
        lambda: get(other, study),
        lambda: get(other, study, "/results"),
        lambda: get_text(other, study, "/export"),
        lambda: other.post(f"{STUDIES}/{study['id']}/link", cast_to=object),
        lambda: other.post(f"{STUDIES}/{study['id']}/close", cast_to=object),
        lambda: other.post(f"{STUDIES}/{study['id']}/retry", cast_to=object),
        lambda: other.delete(f"{STUDIES}/{study['id']}", cast_to=object),
        lambda: other.post(STUDIES, cast_to=object, body={"file": study["settings"]["file"]}),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert study["id"] not in json.dumps(other.get(STUDIES, cast_to=object))
    assert [found["id"] for found in mine.get(STUDIES, cast_to=object)["data"]] == [study["id"]]  # type: ignore[index]
    assert mine.delete(f"{STUDIES}/{study['id']}", cast_to=object) == {"id": study["id"], "object": "tuneyard.study", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        get(mine, study)


def test_the_page_allows_nothing_from_outside(service: Service) -> None:
    study = create(service.client(), given(1))
    with httpx.Client() as http:
        answer, again = (http.get(study["link"].partition("#")[0]) for _ in range(2))
    policy = answer.headers["content-security-policy"]
    [nonce] = set(re.findall(r"'nonce-([^']+)'", policy))
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and nonce not in again.text
    assert re.findall(r"<(?:script|style)[^>]*>", answer.text) == [f'<style nonce="{nonce}">', f'<script nonce="{nonce}">']
    assert not re.search(r"https?://|\bsrc=|\bhref=|\bstyle=|\bon\w+=\"", answer.text)
    assert answer.headers["referrer-policy"] == "no-referrer" and answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("id", ["..", "%2e%2e", "..%2f..%2fkey", "study_x%00", "' OR 1=1 --", "a" * 2000])
@pytest.mark.parametrize("route", ["{}", "{}/results", "{}/export"])
def test_ids_are_no_paths(service: Service, route: str, id: str) -> None:
    with httpx.Client(headers={"authorization": f"Bearer {service.key()}"}) as http:
        assert http.get(f"{service.base_url}{STUDIES}/{route.format(id)}").status_code in (404, 405, 307)
        assert http.get(f"{service.base_url.removesuffix('/v1')}/rate/{id}/study").status_code in (401, 404, 405, 307)


@pytest.mark.parametrize("name", ["", "   ", "\u200b", "x" * 61, None, 3])
def test_a_rater_has_a_name(service: Service, name: Any) -> None:
    url, _, token = create(service.client(), given(1))["link"].partition("#")
    with httpx.Client(headers={"authorization": f"Bearer {token}"}) as http:
        assert http.post(f"{url}/raters", json={"name": name}).status_code == 400


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "body", "why"),
    [
        (b"", {}, "has no rows"),
        (b"{}\n", {"models": ["a", "b"]}, "rows.jsonl:1 is no conversation"),
        (b"{\n", {}, "rows.jsonl:1 is not JSON"),
        (b"[1, 2]", {}, "rows.jsonl:1 is not a JSON object"),
        (b"[" * 100_000, {}, "rows.jsonl is not JSON"),
        (b"\xff\xfe\n", {}, "rows.jsonl:1 is not JSON"),
        ([{"prompt": "x"}], {"models": [BASE]}, "two different models"),
        ([{"prompt": "x"}], {"models": [BASE, BASE]}, "two different models"),
        ([{"prompt": "x"}], {"kind": "likert"}, "one model or two"),
        ([{"prompt": "x"}], {"models": [BASE, "nobody"]}, "nobody"),
        ([{"prompt": " "}], {"models": [BASE, ALIAS]}, "asks nothing"),
        ([{"messages": [{"role": "system", "content": "s"}]}], {"models": [BASE, ALIAS]}, "asks nothing"),
        ([{"messages": [{"role": "wizard", "content": "s"}]}], {"models": [BASE, ALIAS]}, "unknown role"),
        ([{"prompt": "x", "answers": {"a": 1, "b": "y"}}], {}, "not texts"),
        ([{"prompt": "x", "answers": ["a", "b"]}], {}, "not texts"),
        ([{"prompt": "x", "answers": {"a": "x" * 100_001, "b": "y"}}], {}, "more than 100000 characters"),
        ([*given(1), {"prompt": "x"}], {}, "some rows have `answers`"),
        ([*given(1), {"prompt": "x", "answers": {"new": "x"}}], {}, "rows.jsonl:2 has no answer of `old`"),
        (given(1), {"slice_by": "topic"}, "has a column `topic`"),
        (given(1, topic=[1]), {"slice_by": "topic"}, "slice|column of texts"),
        (given(2001), {}, "rate 2000 at most"),
        (given(1), {"models": ["new", "old", "x"]}, "models"),
        (given(1), {"kind": "elo"}, "kind"),
        (given(1), {"temperature": "NaN"}, "temperature"),
        (given(1), {"unknown": 1}, "unknown"),
        (given(1), {"evaluation": "eval_x"}, "both are there"),
    ],
)
def test_files_that_cannot_be_rated_are_refused(service: Service, rows: Any, body: dict[str, Any], why: str) -> None:
    with pytest.raises(openai.APIStatusError, match=why) as caught:
        create(service.client(), rows, **body)
    assert caught.value.status_code in (400, 404)


def test_a_limit_draws_at_random_and_a_json_array_is_read(service: Service) -> None:
    client = service.client()

    def drawn(**body: Any) -> list[str]:
        study = create(client, json.dumps(given(50)).encode(), limit=10, **body)
        return [item.source for item in Studies(service.store).items(study["id"])]

    first = drawn()
    assert len(first) == 10 and first == drawn() != drawn(seed=1) and first != [f"rows.jsonl:{n}" for n in range(1, 11)]


def test_an_evaluations_answers_are_rated(service: Service) -> None:
    client = service.client("acme")
    project = service.store.project_of(client.api_key)
    assert project
    row = Evaluation(
        id="eval_1", project_id=project.id, status="succeeded", model="ft:x", against="x", order={}, created_at=0.0, finished_at=1.0,
        error=None,
    )  # fmt: skip
    evaluations.add(service.store, row)
    case = {"task": "t", "messages": [{"role": "user", "content": "hi"}], "reference": "r", "slice": "s"}
    answers = [("t:1", "base 1", "tuned 1"), ("t:2", "base 2", None), ("t:3", "base 3", "tuned 3")]  # one request failed
    folder = evaluations.folder(service.settings, "eval_1")
    folder.mkdir(parents=True)
    lines = [json.dumps({**case, "id": id, "base": base, "tuned": tuned}) for id, base, tuned in answers]
    (folder / "answers.jsonl").write_text("\n".join(lines))
    study: Any = client.post(STUDIES, cast_to=object, body={"evaluation": "eval_1"})
    assert (study["models"], study["to_rate"], study["status"]) == (["ft:x", "x"], 2, "ready") and "ft:" not in study["name"]
    with Page(study["link"], "Ann") as page:
        page.choose("tuned")
    assert get(client, study, "/results")["slices"]["s"]["wins"] == {"ft:x": 2, "x": 0}
    with pytest.raises(openai.NotFoundError, match="no evaluation"):
        service.client().post(STUDIES, cast_to=object, body={"evaluation": "eval_1"})


def test_models_that_answer_alike(service: Service) -> None:
    rows = [{"prompt": "x", "answers": {"a": "same", "b": "same"}}]
    study = create(service.client(), rows)
    assert study["status"] == "failed" and "answer alike" in study["message"] and study["items"]["identical"] == 1
    assert create(service.client(), rows, kind="likert")["to_rate"] == 2


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", service.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", service.key())

    def run(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["tuneyard", "rate", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        assert (left.value.code or 0) == code, printed.out + printed.err
        return printed.out + printed.err

    data, guide = tmp_path / "data.jsonl", tmp_path / "guide.txt"
    data.write_text("\n".join(map(json.dumps, given(3, topic="[bold]a"))))
    guide.write_text("Be strict.")
    made = json.loads(run("create", str(data), "--instructions", str(guide), "--slice-by", "topic", "--json"))
    for name in ("Ann", "Bob"):
        with Page(made["link"], name) as page:
            page.choose("new")
    told = run("show", made["id"])
    assert "first: new\nsecond: old\n" in told
    for part in ("ready, 3 of 3 items", "Ann: 3 of 3", "[bold]a", "100% (44% to 100%)", "Cohen's kappa not defined, 2 raters, 3 shared"):
        assert part in told, told
    assert json.loads(run("show", made["id"], "--json"))["results"]["wins"] == {"new": 3, "old": 0}
    assert made["id"] in run("list") and "data.jsonl" in run("list")
    pairs = tmp_path / "pairs.jsonl"
    assert "3 lines" in run("export", made["id"], "-o", str(pairs)) and len(pairs.read_text().splitlines()) == 3
    assert len(run("export", made["id"], "--ratings").splitlines()) == 6
    link = run("show", made["id"], "--new-link")
    assert re.search(r"/rate/study_\w+#rate-[\w-]{43}", link)
    assert "is closed" in run("close", made["id"])
    assert "is being rated" in run("retry", made["id"], code=1)
    assert "There is no study" in run("show", "study_x", code=1) and "not a file" in run("create", "none.jsonl", code=1)
    assert "is deleted" in run("delete", made["id"]) and made["id"] not in run("list")
    graded = run("create", str(data), "--kind", "likert")
    assert "3 items. For raters:" in graded and "ready, 3 of 3" in graded
