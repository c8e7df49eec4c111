"""Human evaluation in the database: studies, the items that are shown, who rates them, and the ratings.

What a rater sees is decided by a keyed hash: which answer stands on which side, and in which order items come. The key never leaves the
database, so nothing that a page is given tells which model is which, and the same rater meets the same order again after a break.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import JSON, ForeignKey, UniqueConstraint, delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column

from service.store import Listed, Row, Store, new_id
from trainers.errors import UserError

Kind = Literal["pairwise", "likert"]
MAX_RATERS = 200
SCALES = ("helpfulness", "harmlessness", "honesty")
"""What an answer is graded for, from 1 to 5."""


class Study(Listed):
    """Two models (or one, graded alone) and what people say about their answers."""

    __tablename__ = "studies"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str]
    kind: Mapped[str]
    """`pairwise` or `likert`."""
    status: Mapped[str] = mapped_column(index=True)
    """`generating`, then `ready` to be rated (or `failed`: no item can be), then `closed`."""
    models: Mapped[list[str]]
    settings: Mapped[dict[str, Any]]
    """How it was asked for: file, sampling, instructions for raters."""
    secret: Mapped[str]
    """Key of the order in which a rater sees things."""
    link_sha256: Mapped[str]
    """Of the token in the raters' link, which is shown once."""
    message: Mapped[str] = mapped_column(default="")
    """Why it does not go on, where it does not."""
    created_at: Mapped[float]
    held_by: Mapped[str] = mapped_column(default="")
    held_until: Mapped[float] = mapped_column(default=0.0)
    """Until then the process `held_by` alone asks for its answers."""


class StudyItem(Row):
    """One conversation with each model's answer to it."""

    __tablename__ = "study_items"
    seq: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"), index=True)
    state: Mapped[str]
    """`waiting` for answers, `ready`, `identical` (both answers the same: nobody is asked), or `failed`."""
    source: Mapped[str]
    """`file:line`."""
    slice: Mapped[str | None]
    messages: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    tools: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    answers: Mapped[list[dict[str, Any] | None]] = mapped_column(JSON)
    """An assistant message per model, in the study's order, with the `finish_reason` it came with."""
    error: Mapped[str] = mapped_column(default="")


class Rater(Row):
    __tablename__ = "raters"
    __table_args__ = (UniqueConstraint("study_id", "name_key"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"), index=True)
    name: Mapped[str]
    name_key: Mapped[str]
    """The name without what people write differently from day to day: case, blanks."""
    created_at: Mapped[float]
    finished_at: Mapped[float | None]


class Rating(Row):
    __tablename__ = "ratings"
    rater_id: Mapped[str] = mapped_column(ForeignKey("raters.id"), primary_key=True)
    item: Mapped[int] = mapped_column(ForeignKey("study_items.seq"), primary_key=True)
    model: Mapped[int] = mapped_column(primary_key=True)
    """Place of the graded answer's model; 0 in a comparison."""
    study_id: Mapped[str] = mapped_column(ForeignKey("studies.id"), index=True)
    value: Mapped[dict[str, Any]] = mapped_column(JSON)
    """{"choice": "0", "1", "tie" or "both_bad"} (a model's place, not a side), or a grade per scale."""
    left: Mapped[int]
    """Place of the model whose answer stood on the left."""
    rated_at: Mapped[float]


class Unit(NamedTuple):
    """What is rated at once: an item, and in a Likert study which model's answer to it."""

    item: int
    model: int = 0


@dataclass(frozen=True)
class Sheet:
    """A study as one rater works through it."""

    study: Study
    rater: Rater
    units: list[Unit]
    """In this rater's order."""
    rated: dict[Unit, dict[str, Any]]
    """Ratings given so far, in the models' terms."""


class Studies:
    """Questions and changes, each in one transaction of the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # -- the owner's side --------------------------------------------------------------------------------------------

    def add(self, study: Study, items: Sequence[StudyItem]) -> str:
        """Add a study with its items; the token of its link."""
        token = new_token()
        study.secret, study.link_sha256 = secrets.token_hex(32), sha256(token)
        with self._store.session() as session:
            session.add(study)
            session.flush()
            session.add_all(items)
        return token

    def find(self, project_id: str, study_id: str) -> Study | None:
        with self._store.reading() as session:
            return session.scalar(select(Study).where(Study.project_id == project_id, Study.id == study_id))

    def page(self, project_id: str, after: str | None, limit: int) -> tuple[list[Study], bool]:
        """(studies, more follow), newest first."""
        return self._store.page(Study, select(Study).where(Study.project_id == project_id), after, limit, True)

    def counts(self, study_id: str) -> dict[str, int]:
        """Items by state."""
        with self._store.reading() as session:
            rows = session.execute(select(StudyItem.state, func.count()).where(StudyItem.study_id == study_id).group_by(StudyItem.state))
            return {state: count for state, count in rows}

    def items(self, study_id: str) -> list[StudyItem]:
        with self._store.reading() as session:
            return list(session.scalars(select(StudyItem).where(StudyItem.study_id == study_id).order_by(StudyItem.seq)))

    def raters(self, study_id: str) -> list[tuple[Rater, int]]:
        """Everyone who joined, with how much each has rated."""
        with self._store.reading() as session:
            rows = session.execute(select(Rating.rater_id, func.count()).where(Rating.study_id == study_id).group_by(Rating.rater_id))
            done = {rater: count for rater, count in rows}
            found = session.scalars(select(Rater).where(Rater.study_id == study_id).order_by(Rater.created_at))
            return [(rater, done.get(rater.id, 0)) for rater in found]

    def ratings(self, study_id: str) -> list[Rating]:
        with self._store.reading() as session:
            return list(session.scalars(select(Rating).where(Rating.study_id == study_id).order_by(Rating.rated_at)))

    def new_link(self, study_id: str) -> str:
        """A new token for the link; the one before opens nothing any more."""
        token = new_token()
        self.change(study_id, link_sha256=sha256(token))
        return token

    def change(self, study_id: str, **values: Any) -> None:
        with self._store.session() as session:
            session.execute(update(Study).where(Study.id == study_id).values(**values))

    def again(self, study_id: str) -> int:
        """Have the failed items asked once more; how many they are. None once somebody rates: the items must stay what they are."""
        with self._store.session() as session:
            if session.scalar(select(Rating.item).where(Rating.study_id == study_id).limit(1)) is not None:
                raise UserError(f"Study `{study_id}` is being rated.", "Make a new study: what raters see must not change under them.")
            failed = StudyItem.study_id == study_id, StudyItem.state == "failed"
            count = session.execute(update(StudyItem).where(*failed).values(state="waiting", error="")).rowcount  # type: ignore[attr-defined]
            if count:
                session.execute(update(Study).where(Study.id == study_id).values(status="generating", message="", held_until=0.0))
            return count

    def delete(self, study_id: str) -> None:
        with self._store.session() as session:
            for kind in (Rating, Rater, StudyItem):
                session.execute(delete(kind).where(kind.study_id == study_id))
            session.execute(delete(Study).where(Study.id == study_id))

    # -- answers -----------------------------------------------------------------------------------------------------

    def take(self, owner: str, seconds: float, but: Sequence[str] = ()) -> Study | None:
        """The oldest study that waits for answers and that nobody else works on, now held by `owner`; None when there is none."""
        now = time.time()
        with self._store.reading() as session:
            waits = select(Study).where(Study.status == "generating", Study.held_until < now, Study.id.not_in(but)).order_by(Study.seq)
            study = session.scalars(waits.limit(1)).first()
        if study is None:
            return None
        with self._store.session() as session:
            claim = update(Study).where(Study.id == study.id, Study.held_until < now)
            taken = session.execute(claim.values(held_by=owner, held_until=now + seconds)).rowcount == 1  # type: ignore[attr-defined]
            return study if taken else None

    def hold(self, study_id: str, owner: str, seconds: float) -> bool:
        """Hold a study for longer (0 gives it back); False when it is no longer ours, is done, or is gone."""
        mine = Study.id == study_id, Study.held_by == owner, Study.status == "generating"
        with self._store.session() as session:
            values = {"held_until": time.time() + seconds}
            return session.execute(update(Study).where(*mine).values(**values)).rowcount == 1  # type: ignore[attr-defined]

    def waiting(self, study_id: str, limit: int) -> list[StudyItem]:
        """The next items without answers."""
        query = select(StudyItem).where(StudyItem.study_id == study_id, StudyItem.state == "waiting").order_by(StudyItem.seq)
        with self._store.reading() as session:
            return list(session.scalars(query.limit(limit)))

    def answer(self, item: StudyItem, answers: list[dict[str, Any] | None], state: str, error: str = "") -> None:
        """Keep what came for an item."""
        with self._store.session() as session:
            session.execute(update(StudyItem).where(StudyItem.seq == item.seq).values(answers=answers, state=state, error=error))

    def settle(self, study_id: str) -> bool:
        """Open a study to its raters once no item waits; False while one does."""
        with self._store.session() as session:
            rows = session.execute(select(StudyItem.state, func.count()).where(StudyItem.study_id == study_id).group_by(StudyItem.state))
            counts = Counter({state: count for state, count in rows})
            if counts["waiting"]:
                return False
            why = ""
            if counts["failed"]:
                failed = select(StudyItem).where(StudyItem.study_id == study_id, StudyItem.state == "failed").order_by(StudyItem.seq)
                first = session.scalars(failed.limit(1)).one()
                why = f"{counts['failed']} of {counts.total()} items have no answers; {first.source}: {first.error}"
            if not counts["ready"] and counts["identical"]:
                why = f"{why} The models answer alike: there is nothing to compare.".strip()
            ready = select(StudyItem.answers).where(StudyItem.study_id == study_id, StudyItem.state == "ready")
            if cut := sum(is_cut(answer) for answers in session.scalars(ready) for answer in answers):
                told = f"{cut} answers were cut off, as long as allowed: raters see that, and none is exported as preferred."
                why = f"{why} {told}".strip()
            generating = Study.id == study_id, Study.status == "generating"
            session.execute(update(Study).where(*generating).values(status="ready" if counts["ready"] else "failed", message=why))
            return True

    # -- the raters' side --------------------------------------------------------------------------------------------

    def by_link(self, study_id: str, token: str) -> Study | None:
        """The study whose link has this token."""
        with self._store.reading() as session:
            study = session.scalar(select(Study).where(Study.id == study_id))
            return study if study is not None and hmac.compare_digest(study.link_sha256, sha256(token)) else None

    def join(self, study: Study, name: str) -> tuple[Rater, bool]:
        """(the rater of this name, whether that is a new one). Names that differ in case or blanks are one."""
        shown = " ".join(unicodedata.normalize("NFKC", name).split())
        mine = Rater.study_id == study.id, Rater.name_key == shown.casefold()
        try:
            with self._store.session() as session:
                if (known := session.scalar(select(Rater).where(*mine))) is not None:
                    return known, False
                if session.scalar(select(func.count()).select_from(Rater).where(Rater.study_id == study.id)) >= MAX_RATERS:  # type: ignore[operator]
                    raise UserError(f"This study has {MAX_RATERS} raters already.", "Ask whoever gave you the link.")
                values = {"name": shown, "name_key": shown.casefold(), "created_at": time.time()}
                rater = Rater(id=new_id("rater_"), study_id=study.id, finished_at=None, **values)
                session.add(rater)
            return rater, True
        except IntegrityError:  # two windows at once
            with self._store.session() as session:
                return session.scalars(select(Rater).where(*mine)).one(), False

    def sheet(self, study: Study, rater_id: str) -> Sheet | None:
        """What a rater of this study has before them; None for one that never joined it."""
        with self._store.reading() as session:
            rater = session.scalar(select(Rater).where(Rater.study_id == study.id, Rater.id == rater_id))
            if rater is None:
                return None
            items = session.scalars(select(StudyItem.seq).where(StudyItem.study_id == study.id, StudyItem.state == "ready"))
            places = range(len(study.models) if study.kind == "likert" else 1)
            units = [Unit(item, place) for item in items for place in places]
            units.sort(key=lambda unit: _keyed(study, "place", rater.id, unit.item, unit.model))
            rows = session.scalars(select(Rating).where(Rating.rater_id == rater.id))
            return Sheet(study, rater, units, {Unit(row.item, row.model): row.value for row in rows})

    def item(self, study: Study, seq: int) -> StudyItem:
        with self._store.reading() as session:
            return session.scalars(select(StudyItem).where(StudyItem.study_id == study.id, StudyItem.seq == seq)).one()

    def rate(self, sheet: Sheet, unit: Unit, value: dict[str, Any]) -> None:
        """Keep a rating, in place of the one that this rater gave before."""
        key = (sheet.rater.id, unit.item, unit.model)
        with self._store.session() as session:
            row = session.get(Rating, key)
            if row is None:
                row = Rating(rater_id=key[0], item=unit.item, model=unit.model, study_id=sheet.study.id, left=left_of(sheet, unit))
                session.add(row)
            row.value, row.rated_at = value, time.time()

    def finish(self, rater: Rater) -> None:
        """From now on this rater's ratings stand as they are."""
        with self._store.session() as session:
            session.execute(update(Rater).where(Rater.id == rater.id, Rater.finished_at.is_(None)).values(finished_at=time.time()))


def is_cut(answer: dict[str, Any] | None) -> bool:
    """Whether an answer ends where it was as long as it may be."""
    return bool(answer) and answer.get("finish_reason") == "length"


def left_of(sheet: Sheet, unit: Unit) -> int:
    """Place of the model whose answer this rater sees on the left; of a single answer, its own model."""
    if sheet.study.kind == "likert":
        return unit.model
    return _keyed(sheet.study, "side", sheet.rater.id, unit.item)[0] & 1


def _keyed(study: Study, *parts: object) -> bytes:
    return hmac.digest(study.secret.encode(), "|".join(map(str, parts)).encode(), "sha256")


def new_token() -> str:
    """A link's token. Long and random, as keys are, so a plain hash of it is enough; its beginning tells that it is no API key."""
    return "rate-" + secrets.token_urlsafe(32)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
