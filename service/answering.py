"""Answers for studies, asked in the background through the service's own chat endpoint: some at a time, again after a restart.

A study is held by one process at a time; who is killed loses it after `HOLD_S`. An answer is kept as it comes, so going on asks only what
is missing. What the endpoint refuses (4xx) fails that item; whatever may pass (a model that loads, a cluster that is away) is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from typing import Any

import httpx
from fastapi.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from service.store import Store
from service.studies import Studies, Study, StudyItem
from trainers.errors import Unavailable

log = logging.getLogger("tuneyard.answering")

HOLD_S = 20.0
RENEW_S = 5.0
LOOK_S = 5.0  # a study that another process made is found after so long
AT_ONCE = 8
"""Requests that are out at a time, of all studies together."""
MAX_STUDIES = 4
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Waits between tries of a study that nobody answers; the last one for ever."""
PASSING = frozenset({408, 409, 425, 429})


class Answering:
    """The background work of one API process. `app` is asked as a client would ask it, without the network between."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._store, self._studies = store, Studies(store)
        self._owner = secrets.token_hex(8)
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://tuneyard.internal", timeout=None)
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._fresh = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def wake(self) -> None:
        """There is a new study. From any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._fresh.set)

    async def run(self) -> None:
        """Look after studies until cancelled."""
        self._loop = asyncio.get_running_loop()
        running: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                self._fresh.clear()
                running = {study_id: task for study_id, task in running.items() if not task.done()}
                try:
                    study = await run_in_threadpool(self._studies.take, self._owner, HOLD_S, [*running])
                except Exception:  # the database may be away for a while
                    log.exception("Looking for studies failed; trying again.")
                    study = None
                if study is not None:
                    running[study.id] = asyncio.create_task(self._work(study))
                if study is None or len(running) >= MAX_STUDIES:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._fresh.wait(), LOOK_S)
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)
            await self._http.aclose()

    async def _work(self, study: Study) -> None:
        """Bring one study to its end, or until it is no longer ours."""
        key = await run_in_threadpool(self._store.lend_key, study.project_id)
        holding = asyncio.create_task(self._hold(study))
        answering = asyncio.create_task(self._answer_all(study, key))
        try:
            await asyncio.wait({holding, answering}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        except Exception:
            log.exception("Study %s failed; trying again.", study.id)
        finally:
            for task in (holding, answering):
                task.cancel()
            await asyncio.gather(holding, answering, return_exceptions=True)
            self._store.forget_key(key)  # not in a thread: a cancelled task must do this too
            self._studies.hold(study.id, self._owner, 0)

    async def _hold(self, study: Study) -> None:
        while await run_in_threadpool(self._studies.hold, study.id, self._owner, HOLD_S):
            await asyncio.sleep(RENEW_S)

    async def _answer_all(self, study: Study, key: str) -> None:
        tries = 0
        while not await run_in_threadpool(self._studies.settle, study.id):
            items = await run_in_threadpool(self._studies.waiting, study.id, 4 * AT_ONCE)
            causes = [cause for cause in await asyncio.gather(*(self._answer(study, item, key) for item in items)) if cause]
            tries = tries + 1 if causes and len(causes) == len(items) else 0  # as long as something comes, go on at once
            await run_in_threadpool(self._studies.change, study.id, message=causes[0] if causes else "")
            if causes:
                await asyncio.sleep(PAUSES_S[min(tries, len(PAUSES_S) - 1)])

    async def _answer(self, study: Study, item: StudyItem, key: str) -> str:
        """Ask every model that has not answered this item; why one could not answer yet, else nothing."""
        missing = [place for place, answer in enumerate(item.answers) if answer is None]
        came = await asyncio.gather(*(self._ask(study, study.models[place], item, key) for place in missing))
        answers, refused, later = list(item.answers), "", ""
        for place, answer in zip(missing, came, strict=True):
            if isinstance(answer, dict):
                answers[place] = answer
            elif isinstance(answer, Unavailable):
                later = f"{study.models[place]}: {answer.message}"
            else:
                refused = f"{study.models[place]}: {answer}"
        state = "failed" if refused else "waiting" if later else state_of(study.kind, answers)
        if state != "waiting" or answers != item.answers:
            await run_in_threadpool(self._studies.answer, item, answers, state, refused)
        return "" if refused else later

    async def _ask(self, study: Study, model: str, item: StudyItem, key: str) -> dict[str, Any] | str | Unavailable:
        """A model's message; the refusal as text; or Unavailable, which may pass."""
        sampling = {name: study.settings[name] for name in ("temperature", "max_tokens", "seed") if study.settings.get(name) is not None}
        body = {"model": model, "messages": item.messages, **sampling, **({"tools": item.tools} if item.tools else {})}
        async with self._gate:
            try:
                response = await self._http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            except Exception as error:  # from inside the app, as no network is between
                log.exception("Asking %s failed.", model)
                return Unavailable(f"{type(error).__name__} while it was asked")
        try:
            told = response.json()
            if response.is_success:
                choice = told["choices"][0]
                message = {"role": "assistant", "content": choice["message"].get("content") or ""}
                if calls := choice["message"].get("tool_calls"):
                    message["tool_calls"] = calls
                return {**message, "finish_reason": choice.get("finish_reason")}
            cause = str(told["error"]["message"])
        except (ValueError, KeyError, IndexError, TypeError):
            cause = f"status {response.status_code}, no chat completion"
        return Unavailable(cause) if response.status_code >= 500 or response.status_code in PASSING else cause


def state_of(kind: str, answers: list[dict[str, Any] | None]) -> str:
    """The state of an item with all its answers: nobody is asked to compare a text with itself."""
    said = [{key: value for key, value in (answer or {}).items() if key != "finish_reason"} for answer in answers]
    return "identical" if kind == "pairwise" and said[0] == said[1] else "ready"
