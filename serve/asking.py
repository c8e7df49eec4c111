"""Asking models over HTTP: many requests at a time, tried again, and kept in the run directory, so that none is paid for twice."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from trainers.errors import Unavailable
from trainers.records import KeptRecord, RunDir

if TYPE_CHECKING:
    from trainers.chat import Chat

Json = dict[str, Any]

CONCURRENCY = 32  # what one replica batches well
TRIES = 4
PROGRESS_S = 0.5  # progress and kept answers are synced to disk; more often would only cost time


@dataclass(frozen=True)
class Endpoint:
    """The serving app of a base model, which also answers with adapters over it."""

    url: str
    """For example http://127.0.0.1:8000/smollm2-135m-instruct; `/v1/chat/completions` is added."""
    token: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0
    backoff_s: float = 0.5
    """Pause before the second try; twice as long before each further one."""


@dataclass(frozen=True)
class Model:
    """A model as the serving app knows it."""

    name: str
    adapter: str | None = None
    """PEFT folder; None = the app's model as it is."""
    url: str | None = None
    """Its own serving app; None = the endpoint's."""
    chat: Chat | None = field(default=None, compare=False, repr=False)
    """How it reads conversations: needed where log-likelihoods are asked for."""


@dataclass(frozen=True)
class Peer:
    """Where requests go, and with which headers."""

    name: str
    url: str
    """Up to and without `/v1`."""
    headers: dict[str, str] = field(repr=False)
    id: str
    """What answers, wherever it runs now: part of every request's key."""
    secret: str | None = field(default=None, repr=False)
    """Never told, not even where an answer repeats it."""

    @classmethod
    def of(cls, endpoint: Endpoint, model: Model) -> Peer:
        headers = {"x-tuneyard-model": model.name}
        if endpoint.token:
            headers["authorization"] = f"Bearer {endpoint.token}"
        if model.adapter:
            headers["x-tuneyard-adapter"] = model.adapter
        return cls(model.name, model.url or endpoint.url, headers, f"{model.name} {model.adapter or ''}", endpoint.token)


@dataclass(frozen=True)
class Question:
    """One request, and what of its response is kept."""

    peer: Peer
    path: str
    body: Json
    read: Callable[[Json], Any]
    """The response -> a JSON value. ValueError, KeyError, IndexError and TypeError mean that it is no answer (a proxy's page, say)."""

    @property
    def key(self) -> str:
        """Hash of all that the answer depends on."""
        asked = json.dumps([self.peer.id, self.path, self.body], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Asker:
    """Asks within one event loop. What is in the run directory already is not asked again."""

    def __init__(self, run: RunDir, timeout_s: float, backoff_s: float, tick: Callable[[], None] = lambda: None) -> None:
        """`tick` is called after each answer, and after each failure."""
        self._run, self._backoff_s, self.tick = run, backoff_s, tick
        self._kept = run.kept()
        self._fresh: list[KeptRecord] = []
        self._written = time.monotonic()
        self._timeout_s = timeout_s
        self._gate = asyncio.Semaphore(CONCURRENCY)
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False)

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        self._write()

    async def ask(self, question: Question, *, counts: bool = True) -> Any:
        """The kept part of an answer, or an Unavailable that says why there is none. At most CONCURRENCY requests are out at a time. What
        does not count makes no tick."""
        key = question.key
        value = self._kept.get(key)
        if value is None:
            async with self._gate:
                value = await self._send(question)
            if not isinstance(value, Unavailable):
                self._kept[key] = value
                self._fresh.append(KeptRecord(key=key, value=value))
                if time.monotonic() - self._written >= PROGRESS_S:
                    self._write()
        if counts:
            self.tick()
        return value

    async def ask_all(self, questions: list[Question]) -> list[Any]:
        return list(await asyncio.gather(*map(self.ask, questions)))

    async def _send(self, question: Question) -> Any:
        """What the client itself got wrong (4xx) is not tried again."""
        peer, cause = question.peer, ""
        headers = {
            k.encode(): v.encode() for k, v in peer.headers.items()
        }  # a folder's name may hold any letter; as str, httpx takes ASCII
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(self._backoff_s * 2 ** (attempt - 1))
            try:
                response = await self._client.post(f"{peer.url}{question.path}", json=question.body, headers=headers)
            except httpx.HTTPError as error:
                cause = f"{type(error).__name__}: {error}"
                if isinstance(error, httpx.ReadTimeout):
                    cause = f"no answer within {self._timeout_s:g} s"
                    if attempt:  # who is that slow again only has more to do with every further try
                        break
                continue
            cause = f"HTTP {response.status_code}: {response.text[:200]}"
            if response.status_code == 200:
                try:
                    return question.read(response.json())
                except (ValueError, KeyError, IndexError, TypeError):
                    continue
            elif response.status_code < 500 and response.status_code not in (408, 409, 429):
                break
        return Unavailable(cause.replace(peer.secret, "***") if peer.secret else cause)

    def _write(self) -> None:
        self._run.append("answers", self._fresh)
        self._fresh, self._written = [], time.monotonic()


def chat_question(peer: Peer, messages: list[dict[str, str]], max_tokens: int, **more: Any) -> Question:
    """Ask for an answer; greedy unless told otherwise. Kept: {"text", "finish", "tokens"}."""
    body = {"model": peer.name, "messages": messages, "temperature": 0, "max_tokens": max_tokens, **more}
    return Question(peer, "/v1/chat/completions", body, _said)


def _said(response: Json) -> Json:
    choice = response["choices"][0]
    return {
        "text": choice["message"]["content"] or "",
        "finish": choice.get("finish_reason"),
        "tokens": (response.get("usage") or {}).get("completion_tokens"),
    }


def likelihood_question(peer: Peer, prompts: list[list[int]], spans: list[tuple[tuple[int, int], ...]]) -> Question:
    """Ask for the log-likelihood of some tokens of each prompt (token ids); `spans` are their [start, stop), per prompt.

    Nothing is generated: the prompt is echoed with its log-probabilities. Kept: one sum, in nats, for each prompt.
    """

    def read(response: Json) -> list[float]:
        by_index = {choice["index"]: choice["logprobs"]["token_logprobs"] for choice in response["choices"]}
        sums = []
        for i, (ids, of) in enumerate(zip(prompts, spans, strict=True)):
            if len(by_index[i]) != len(ids):
                raise ValueError("not every token of the prompt has come back")
            sums.append(float(sum(sum(by_index[i][start:stop]) for start, stop in of)))
        return sums

    body = {"model": peer.name, "prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
    return Question(peer, "/v1/completions", body, read)
