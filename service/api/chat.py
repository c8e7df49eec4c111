"""/v1/chat/completions and /v1/completions: authenticate, map the name, stream from the app on Ray Serve that answers for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import httpx
import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.api import errors
from service.api.auth import Caller, Cluster, Config, Db
from service.api.models import Target, target
from service.api.quick import quickly
from service.replicas import Replicas
from service.settings import Settings
from service.store import Project, Store
from trainers.errors import TuneyardError, Unavailable, UserError

router = APIRouter(prefix="/v1")

PROBE_S = 0.25
FORWARDED = ("content-type", "retry-after")
EVENT_END = b"\n\n"


class ServingFailed(TuneyardError):
    """The serving app broke down over a request."""

    code = "serving_failed"


@router.post("/chat/completions")
@router.post("/completions")
async def completions(request: Request, settings: Config, store: Db, link: Cluster, caller: Caller) -> Response:
    content = await request.body()
    name = _model_of(content)
    found, addresses = await quickly(_find, store, settings, caller, name)
    headers = {
        "authorization": f"Bearer {settings.serve_token_file.read_text(encoding='utf-8')}",
        "content-type": "application/json",
        "accept-encoding": "identity",  # what comes is passed on as it is
        "x-tuneyard-model": name,
        "x-tuneyard-adapter": str(found.adapter or ""),
    }
    encoded = {k.encode(): v.encode() for k, v in headers.items()}  # a folder's name may hold any letter; as str, httpx takes only ASCII
    http: httpx.AsyncClient = request.app.state.http
    replicas: Replicas = request.app.state.replicas
    deadline = time.monotonic() + settings.chat_wait_s
    waits = False
    while True:
        for _ in range(max(1, len(addresses))):  # one that is gone is met by those who come before the runner has seen it
            async with AsyncExitStack() as held:
                place = f"{link.serve_host}:{link.serve_port}"  # Serve's proxy
                if addresses:
                    place = held.enter_context(replicas.chosen(addresses, str(found.adapter)))
                url = f"http://{place}/{found.app}{request.url.path}"
                upstream = await _send(request, http, http.build_request("POST", url, content=content, headers=encoded))
                if upstream is not None:
                    held.push_async_callback(upstream.aclose)
                    return Relayed(upstream, held.pop_all())
            addresses = [address for address in addresses if address != place]
        if await request.is_disconnected():
            return Response(status_code=499)  # nobody reads it
        if not waits:
            waits = True
            await quickly(store.ask_for, found.app, 0.0)  # it was unloaded: now it is the one that was asked last
            link.changed.set()
        if time.monotonic() > deadline:
            raise Unavailable(f"`{name}` is still being loaded.", "Ask again in a few seconds.", "model")
        await asyncio.sleep(PROBE_S)
        status, message, addresses = await quickly(store.app_status, found.app)
        if status == "DEPLOY_FAILED":
            raise Unavailable(f"`{name}` cannot be loaded: {message}", "See the serving log of the cluster.", "model")


def _find(store: Store, settings: Settings, caller: Project, name: str) -> tuple[Target, list[str]]:
    """What the name stands for, and the addresses of the replicas that answer for it."""
    found = target(store, settings, caller, name)
    return found, store.ask_for(found.app)


def _model_of(content: bytes) -> str:
    try:
        body: Any = orjson.loads(content)
    except ValueError as error:
        raise UserError(f"The body is not JSON: {error}.", "Send a JSON object; JSON has no NaN and no Infinity.") from None
    name = body.get("model") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError("`model` is missing.", "Name a model from GET /v1/models.", "model")
    return name


async def _send(request: Request, http: httpx.AsyncClient, outgoing: httpx.Request) -> httpx.Response | None:
    """The app's response, its body still to be read; None while the app is not there yet, or when the caller has left."""
    sending = asyncio.create_task(http.send(outgoing, stream=True))
    try:
        # A full answer takes a while to begin; who no longer waits for it must not keep the model busy.
        while not sending.done():
            await asyncio.wait({sending}, timeout=0.5)
            if not sending.done() and await request.is_disconnected():
                return None
        upstream = sending.result()
    except (httpx.ConnectError, httpx.ConnectTimeout):
        return None
    except httpx.TransportError as error:
        raise Unavailable(f"The model was lost while it answered ({type(error).__name__}).", "Ask again.", "model") from None
    finally:
        sending.cancel()
    if upstream.is_success or "json" in upstream.headers.get("content-type", ""):
        return upstream
    await upstream.aclose()
    # Serve's own proxy answers in plain text, and so for a route that it does not know yet; our app never does.
    if upstream.status_code in (404, 503):
        return None
    raise ServingFailed(f"The serving app failed with status {upstream.status_code}.", "See the serving log of the cluster.", "model")


class Relayed(StreamingResponse):
    """The app's answer, passed on as it comes. When it is over, or the caller leaves, the connection to the app is closed, which ends the
    work there."""

    def __init__(self, upstream: httpx.Response, held: AsyncExitStack) -> None:
        kept = {k: v for k, v in upstream.headers.items() if k in FORWARDED}
        events = kept.get("content-type", "").startswith("text/event-stream")
        super().__init__(_events(upstream) if events else upstream.aiter_raw(), upstream.status_code, kept)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


async def _events(upstream: httpx.Response) -> AsyncIterator[bytes]:
    """Server-sent events, each whole. Where the app is lost in the middle, the last one says so: a stream that just ends would be taken
    for a whole answer."""
    waiting, last = b"", b""
    try:
        async with aclosing(upstream.aiter_raw()) as parts:  # type: ignore[type-var]  # httpx calls its generator an iterator
            async for part in parts:
                whole, end, waiting = (waiting + part).rpartition(EVENT_END)
                if end:
                    last = whole.rpartition(EVENT_END)[2]
                    yield whole + end
        why = "its process ended"
    except httpx.TransportError as error:
        why = type(error).__name__
    if last != b"data: [DONE]" and not last.startswith(b'data: {"error"'):
        lost = Unavailable(f"The model was lost while it answered ({why}).", "Ask again.", "model")
        yield b"data: " + orjson.dumps(errors.body(lost.status, str(lost), lost.code, lost.param, lost.remedy)) + EVENT_END
