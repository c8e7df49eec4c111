"""/rate: what raters see of a study. The page is the same for everybody; its script shows what the link's token opens.

A link's token opens one study and nothing else: it is no API key, and no API key comes near the page. Nothing here tells a rater which
model an answer is of until that rater has finished, after which ratings stand.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from service.api.auth import Db
from service.api.errors import NotFound, Unauthorized
from service.datareport import pages
from service.studies import SCALES, Sheet, Studies, Study, Unit, is_cut, left_of
from trainers.errors import UserError

router = APIRouter(prefix="/rate/{study_id}", include_in_schema=False)

SCRIPT = (Path(__file__).parents[1] / "pages" / "rate.js").read_text(encoding="utf-8")
SIDES = ("left", "right")


@router.get("")
def page(study_id: str) -> HTMLResponse:
    """The page, which knows nothing of any study yet."""
    nonce = secrets.token_urlsafe(16)
    policy = {
        "default-src": "'none'",
        "script-src": f"'nonce-{nonce}'",
        "style-src": f"'nonce-{nonce}'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
    }
    return HTMLResponse(pages().get_template("rate.html").render(nonce=nonce, script=Markup(SCRIPT)), headers=headers)


def _study(request: Request, store: Db, study_id: str) -> Study:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    study = Studies(store).by_link(study_id, token.strip()) if scheme.lower() == "bearer" else None
    if study is None:
        raise Unauthorized("This link does not open a study (any more).", "Ask whoever gave it to you for a new one.")
    return study


def _sheet(store: Db, study: Annotated[Study, Depends(_study)], rater_id: str) -> Sheet:
    if study.status not in ("ready", "closed"):
        raise UserError("This study is not open yet.", "Come back when its answers are there.")
    sheet = Studies(store).sheet(study, rater_id)
    if sheet is None:
        raise NotFound("This study has no such rater.", "Open the link again and give your name.")
    return sheet


Open = Annotated[Study, Depends(_study)]
Mine = Annotated[Sheet, Depends(_sheet)]


class Join(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(max_length=60, pattern=r"\w")]


class Choice(BaseModel):
    model_config = ConfigDict(extra="forbid")
    choice: Literal["left", "right", "tie", "both_bad"]


Grade = Annotated[int, Field(ge=1, le=5, strict=True)]


class Grades(BaseModel):
    model_config = ConfigDict(extra="forbid")
    helpfulness: Grade
    harmlessness: Grade
    honesty: Grade


@router.get("/study")
def about(store: Db, study: Open) -> dict[str, Any]:
    """What a rater is told before the start. The models' names are not in it."""
    counts = Studies(store).counts(study.id)
    return {
        "kind": study.kind,
        "status": study.status,
        "name": study.name,
        "instructions": study.settings["instructions"],
        "total": counts.get("ready", 0) * (len(study.models) if study.kind == "likert" else 1),
        "answered": sum(counts.values()) - counts.get("waiting", 0),
        "items": sum(counts.values()),
        "scales": SCALES,
    }


@router.post("/raters")
def join(store: Db, study: Open, body: Join) -> dict[str, Any]:
    """Begin, or go on under the same name."""
    if study.status != "ready":
        raise UserError(f"This study is {'closed' if study.status == 'closed' else 'not open yet'}.", "Ask whoever gave you the link.")
    studies = Studies(store)
    rater, fresh = studies.join(study, body.name)
    sheet = studies.sheet(study, rater.id)
    assert sheet is not None
    return {"rater": rater.id, "name": rater.name, "known": not fresh, **_progress(sheet)}


@router.get("/raters/{rater_id}")
def progress(sheet: Mine) -> dict[str, Any]:
    return {"rater": sheet.rater.id, "name": sheet.rater.name, **_progress(sheet)}


@router.get("/raters/{rater_id}/units/{number}")
def unit(store: Db, sheet: Mine, number: int) -> dict[str, Any]:
    """What is rated at this place, and this rater's own rating of it, if there is one."""
    which = _unit(sheet, number)
    item = Studies(store).item(sheet.study, which.item)
    left = left_of(sheet, which)
    places = [which.model] if sheet.study.kind == "likert" else [left, 1 - left]
    return {
        "number": number,
        "conversation": [{"role": message["role"], "text": _text(message)} for message in item.messages],
        "answers": [_text(item.answers[place] or {}) for place in places],
        "cut": [is_cut(item.answers[place]) for place in places],
        "mine": _as_seen(sheet, which),
        **_progress(sheet),
    }


@router.put("/raters/{rater_id}/units/{number}")
def rate(store: Db, sheet: Mine, number: int, body: Choice | Grades) -> dict[str, Any]:
    """Keep a rating; a later one of the same place replaces it."""
    which = _unit(sheet, number)
    if isinstance(body, Grades) != (sheet.study.kind == "likert"):
        raise UserError("This is not how answers are rated in this study.", "Load the page again.")
    if sheet.study.status == "closed":
        raise UserError("This study is closed.", "Your ratings up to now are kept.")
    if sheet.rater.finished_at is not None:
        raise UserError("You have finished: your ratings stand.", "Ask whoever gave you the link.")
    value = body.model_dump()
    if isinstance(body, Choice) and body.choice in SIDES:
        left = left_of(sheet, which)
        value = {"choice": str(left if body.choice == "left" else 1 - left)}
    Studies(store).rate(sheet, which, value)
    sheet.rated[which] = value
    return _progress(sheet)


@router.post("/raters/{rater_id}/finish")
def finish(store: Db, sheet: Mine) -> dict[str, Any]:
    """End: from now on the ratings stand, and the rater may know whose answers they were."""
    if (left := len(sheet.units) - len(sheet.rated)) > 0:
        raise UserError(f"{left} of {len(sheet.units)} are not rated yet.", "Rate them first.")
    Studies(store).finish(sheet.rater)
    return {"finished": True, "revealed": _revealed(sheet)}


def _unit(sheet: Sheet, number: int) -> Unit:
    if not 1 <= number <= len(sheet.units):
        raise NotFound(f"There is nothing at place {number}.", f"Places go from 1 to {len(sheet.units)}.")
    return sheet.units[number - 1]


def _progress(sheet: Sheet) -> dict[str, Any]:
    finished = sheet.rater.finished_at is not None
    unrated = next((n for n, which in enumerate(sheet.units, 1) if which not in sheet.rated), None)
    told = {"total": len(sheet.units), "rated": len(sheet.rated), "next": unrated, "finished": finished}
    return told | ({"revealed": _revealed(sheet)} if finished else {})


def _as_seen(sheet: Sheet, which: Unit) -> dict[str, Any] | None:
    """A rating in the rater's terms: sides, not models."""
    value = sheet.rated.get(which)
    if value is None or value.get("choice") not in ("0", "1"):
        return value
    return {"choice": "left" if int(value["choice"]) == left_of(sheet, which) else "right"}


def _revealed(sheet: Sheet) -> list[dict[str, Any]]:
    """What this rater thought of each model."""
    told = []
    for place, model in enumerate(sheet.study.models):
        if sheet.study.kind == "pairwise":
            told.append({"model": model, "preferred": sum(value["choice"] == str(place) for value in sheet.rated.values())})
        else:
            mine = [value for which, value in sheet.rated.items() if which.model == place]
            told.append({"model": model, "means": {scale: sum(value[scale] for value in mine) / len(mine) for scale in SCALES}})
    return told


def _text(message: dict[str, Any]) -> str:
    """A message as people read it, tool calls included."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    parts = [str(message.get("content") or ""), *(f"{call['name']}({_arguments(call['arguments'])})" for call in calls)]
    return "\n\n".join(part for part in parts if part)


def _arguments(text: str) -> str:
    try:
        return json.dumps(json.loads(text), ensure_ascii=False, indent=2)
    except ValueError:
        return text
