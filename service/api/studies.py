"""/v1/tuneyard/studies: human evaluation, as its owner sees it. What raters see is in rating.py."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from service import evaluations, studyfile, verdicts
from service.answering import state_of
from service.api.auth import Background, Caller, Config, Db
from service.api.errors import NotFound
from service.api.files import existing as existing_file
from service.api.models import target
from service.settings import Settings
from service.store import Project, Store, new_id
from service.studies import Kind, Studies, Study, StudyItem
from trainers.errors import DataError, UserError

router = APIRouter(prefix="/v1/tuneyard/studies")


class CreateStudy(BaseModel):
    """What to rate: a file of conversations, which the models answer, or of answers (see studyfile.py); or an evaluation's answers."""

    model_config = ConfigDict(extra="forbid")

    file: str = ""
    evaluation: str = ""
    """Instead of a file: the answers that this evaluation got."""
    models: Annotated[list[str], Field(max_length=2)] = []
    """Two to compare; one or two to grade. Left out, those that the file has answers of."""
    kind: Kind = "pairwise"
    name: Annotated[str, Field(max_length=100)] = ""
    instructions: Annotated[str, Field(max_length=4000)] = ""
    """Shown to raters."""
    slice_by: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    limit: Annotated[int, Field(ge=1, le=studyfile.MAX_ITEMS)] | None = None
    """So many rows, drawn at random by `seed`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] = 512


def existing(store: Store, project: Project, study_id: str) -> Study:
    """The project's study of this id, or NotFound."""
    study = Studies(store).find(project.id, study_id)
    if study is None:
        raise NotFound(f"There is no study `{study_id}`.", "List yours with GET /v1/tuneyard/studies.", "study_id")
    return study


def to_wire(studies: Studies, study: Study) -> dict[str, Any]:
    counts = studies.counts(study.id)
    raters = studies.raters(study.id)
    shown = counts.get("ready", 0) * (len(study.models) if study.kind == "likert" else 1)
    return {
        "object": "tuneyard.study",
        "id": study.id,
        "created_at": int(study.created_at),
        "name": study.name,
        "kind": study.kind,
        "status": study.status,
        "message": study.message,
        "models": study.models,
        "items": {"total": sum(counts.values()), **{state: counts.get(state, 0) for state in ("waiting", "ready", "identical", "failed")}},
        "to_rate": shown,
        "raters": [{"name": rater.name, "rated": done, "finished": rater.finished_at is not None} for rater, done in raters],
        "settings": study.settings,
    }


@router.post("")
def create(request: Request, settings: Config, store: Db, caller: Caller, background: Background, body: CreateStudy) -> dict[str, Any]:
    """Make a study; `link` is where raters go, shown this once."""
    rows, source = _rows(settings, store, caller, body)
    models = _models(rows, body)
    given = rows[0]["answers"] is not None
    if not given:
        for name in models:
            target(store, settings, caller, name)
    asked = body.model_dump(include={"file", "evaluation", "instructions", "slice_by", "limit", "seed", "temperature", "max_tokens"})
    study = Study(
        id=new_id("study_"), project_id=caller.id, name=body.name or source, kind=body.kind, status="generating", models=models,
        settings={**asked, "source": source, "answers": "given" if given else "asked"}, created_at=time.time(),
    )  # fmt: skip
    studies = Studies(store)
    token = studies.add(study, [_item(study, row, given) for row in rows])
    if given:
        studies.settle(study.id)
        study = existing(store, caller, study.id)
    background.wake()
    return {**to_wire(studies, study), "link": _link(request, study.id, token)}


def _rows(settings: Settings, store: Store, caller: Project, body: CreateStudy) -> tuple[list[studyfile.Item], str]:
    """(what the request names, what that is called)."""
    if bool(body.file) == bool(body.evaluation):
        raise UserError("`file` or `evaluation` is missing, or both are there.", "Name one of them.", "file")
    if body.file:
        file = existing_file(store, caller, body.file, "file")
        return studyfile.read(settings.home / file.path, file.filename, body.slice_by, body.limit, body.seed), file.filename
    if body.slice_by:
        raise UserError("An evaluation has its slices already.", "Leave `slice_by` out.", "slice_by")
    found = evaluations.get(store, caller.id, body.evaluation)
    path = evaluations.folder(settings, body.evaluation) / "answers.jsonl" if found else None
    if found is None or path is None or not path.is_file():
        raise NotFound(
            f"There is no evaluation `{body.evaluation}` with answers.", "List yours with GET /v1/tuneyard/evaluations.", "evaluation"
        )
    names = {"tuned": found.model, "base": found.against}
    return studyfile.of_evaluation(path, names, body.limit, body.seed), body.evaluation  # raters see it: no model's name


def _models(rows: list[studyfile.Item], body: CreateStudy) -> list[str]:
    """The study's models, in order; raises UserError where the file and the request do not go together."""
    named: list[str] = list(rows[0]["answers"] or ())
    models = body.models or named
    least = 2 if body.kind == "pairwise" else 1
    if not least <= len(models) <= 2 or len(set(models)) != len(models) or any(not 0 < len(name) <= 300 for name in models):
        rule = "two different models" if least == 2 else "one model or two"
        raise UserError(f"`models` is {json.dumps(models)[:200]}; a {body.kind} study has {rule}.", "Name them in `models`.", "models")
    for row in rows:
        if (row["answers"] is None) != (not named):
            raise DataError(f"{row['source']}: some rows have `answers` and some have none.", "Give all of them, or none.", "file")
        if row["answers"] is not None and (lacking := [name for name in models if name not in row["answers"]]):
            raise DataError(f"{row['source']} has no answer of `{lacking[0]}`.", "Give every model's answer in every row.", "file")
    return models


def _item(study: Study, row: studyfile.Item, given: bool) -> StudyItem:
    answers: list[dict[str, Any] | None] = [
        {"role": "assistant", "content": row["answers"][model], "finish_reason": None} if given else None for model in study.models
    ]
    return StudyItem(
        study_id=study.id, state=state_of(study.kind, answers) if given else "waiting", source=row["source"], slice=row["slice"],
        messages=row["messages"], tools=row["tools"], answers=answers,
    )  # fmt: skip


def _link(request: Request, study_id: str, token: str) -> str:
    """Where raters go. The token stands after the #, which browsers keep to themselves: no log and no referrer has it."""
    return f"{request.base_url}rate/{study_id}#{token}"


@router.get("")
def list_studies(
    store: Db, caller: Caller, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:  # fmt: skip
    studies = Studies(store)
    found, more = studies.page(caller.id, after, limit)
    return {"object": "list", "data": [to_wire(studies, study) for study in found], "has_more": more}


@router.get("/{study_id}")
def retrieve(store: Db, caller: Caller, study_id: str) -> dict[str, Any]:
    return to_wire(Studies(store), existing(store, caller, study_id))


@router.get("/{study_id}/results")
def results(store: Db, caller: Caller, study_id: str) -> dict[str, Any]:
    """What the ratings say so far."""
    study = existing(store, caller, study_id)
    studies = Studies(store)
    raters = [rater for rater, _ in studies.raters(study.id)]
    return verdicts.results(study, studies.items(study.id), raters, studies.ratings(study.id))


@router.get("/{study_id}/export")
def export(store: Db, caller: Caller, study_id: str, form: Literal["preferences", "ratings"] = "preferences") -> StreamingResponse:
    """JSON lines: preference pairs as OpenAI's DPO data has them, or each rating by itself."""
    study = existing(store, caller, study_id)
    studies = Studies(store)
    items, ratings = studies.items(study.id), studies.ratings(study.id)
    if form == "ratings":
        made = verdicts.lines(study, items, [rater for rater, _ in studies.raters(study.id)], ratings)
    elif len(study.models) == 2:
        made = verdicts.preferences(study, items, ratings)
    else:
        raise UserError(f"Study `{study_id}` has one model: nothing was preferred.", "Export with form=ratings.", "form")
    headers = {"content-disposition": f'attachment; filename="{study.id}-{form}.jsonl"'}
    return StreamingResponse(_jsonl(made), media_type="application/jsonl", headers=headers)


def _jsonl(lines: Iterator[dict[str, Any]]) -> Iterator[str]:
    yield from (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@router.post("/{study_id}/link")
def new_link(request: Request, store: Db, caller: Caller, study_id: str) -> dict[str, Any]:
    """A new link for raters, shown this once; the one before opens nothing any more."""
    study = existing(store, caller, study_id)
    return {"object": "tuneyard.study.link", "link": _link(request, study.id, Studies(store).new_link(study.id))}


@router.post("/{study_id}/close")
def close(store: Db, caller: Caller, study_id: str) -> dict[str, Any]:
    """Take no more ratings."""
    study = existing(store, caller, study_id)
    if study.status != "ready":
        raise UserError(f"Study `{study_id}` is {study.status}.", "Only one that is ready can be closed.", "study_id")
    Studies(store).change(study.id, status="closed")
    return retrieve(store, caller, study_id)


@router.post("/{study_id}/retry")
def retry(store: Db, caller: Caller, background: Background, study_id: str) -> dict[str, Any]:
    """Ask the models again for the items that failed, as long as nobody has rated."""
    study = existing(store, caller, study_id)
    if not Studies(store).again(study.id):
        raise UserError(f"No item of study `{study_id}` has failed.", "There is nothing to ask again.", "study_id")
    background.wake()
    return retrieve(store, caller, study_id)


@router.delete("/{study_id}")
def delete(store: Db, caller: Caller, study_id: str) -> dict[str, Any]:
    """Forget a study with all its answers and ratings."""
    Studies(store).delete(existing(store, caller, study_id).id)
    return {"id": study_id, "object": "tuneyard.study", "deleted": True}
