"""One Ray Serve application: one model, its engine and the OpenAI chat wire.

The model is a base, which also answers with adapters over it, or a whole tuned model. The gateway in service/ is the only client: it has
the token, and says by header which name to echo (`x-tuneyard-model`) and which PEFT folder to answer with (`x-tuneyard-adapter`, in UTF-8;
empty = the model as it is).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.serve import Application
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve import protocol
from serve.chats import Chats
from serve.engine import Engine, GenerateRequest, TokenEvent
from trainers.chat import Chat, Message
from trainers.errors import TuneyardError, UserError

DRAIN_S = 120.0  # an unloaded model may finish the answers that it has begun; Serve's own 20 s would cut long ones


def build(args: dict[str, Any]) -> Application:
    """For Serve's declarative config (`import_path: serve.app:build`).

    args: `name` (echoed where no header names the model), `model_dir`, `token_file`, and optionally `max_adapter_bytes`.
    """

    def asgi() -> Starlette:  # runs in the replica: only there is the model loaded
        from serve.transformers_engine import TransformersEngine

        limits = {k: args[k] for k in ("max_adapter_bytes",) if k in args}
        engine = TransformersEngine(Path(args["model_dir"]), **limits)
        token = Path(args["token_file"]).read_text(encoding="utf-8").strip()
        return application(engine, Chats(Path(args["model_dir"])), args["name"], token)

    # A local replica reserves no CPU: a training job beside it would otherwise wait for ever.
    deployment = ray_serve.deployment(
        name="engine", max_ongoing_requests=256, ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=DRAIN_S
    )
    return deployment(ray_serve.ingress(asgi)()).bind()


def application(engine: Engine, chats: Chats, name: str, token: str) -> Starlette:
    """The ASGI application around an engine."""
    server = Server(engine, chats, name)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    routes = [
        Route("/healthz", server.healthz),
        Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
        Route("/v1/tuneyard/prompt", server.prompt, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(TokenCheck, token=token)],
        exception_handlers={TuneyardError: show_error, Exception: show_error},
    )


class WrongToken(UserError):
    code = "invalid_api_key"
    status = 401


class TokenCheck:
    """Every path but /healthz asks for the bearer token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].endswith("/healthz"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self.expected):
                error = WrongToken("The serving token is missing or wrong.", "Talk to the service's base_url, not to the serving app.")
                return await JSONResponse(protocol.error_body(error), error.status)(scope, receive, send)
        await self.app(scope, receive, send)


async def show_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, TuneyardError):  # a fault of ours: Starlette logs it, the client is told in the form it knows
        error = TuneyardError(f"The serving app failed ({type(error).__name__}).", "Its log says more.")
    return JSONResponse(protocol.error_body(error), error.status)


class Server:
    """The routes."""

    def __init__(self, engine: Engine, chats: Chats, name: str) -> None:
        self.engine, self.chats, self.name = engine, chats, name

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "name": self.name, "running": self.engine.num_running})

    async def prompt(self, request: Request) -> Response:
        """The ids that the model would be given for these messages: lets the training side check that it saw the same."""
        _, ids = await self._prompt(adapter_of(request), protocol.parse_messages(await request.body()))
        return JSONResponse({"prompt_ids": ids})

    async def chat_completions(self, request: Request) -> Response:
        asked = protocol.parse(await request.body())
        adapter = adapter_of(request)
        chat, prompt_ids = await self._prompt(adapter, [m.plain() for m in asked.messages])
        answer = Answer(
            asked=asked,
            model=request.headers.get("x-tuneyard-model") or self.name,
            prompt_ids=prompt_ids,
            stop_ids=chat.stop_ids,
            adapter=adapter,
        )
        if not asked.stream:
            return JSONResponse(await answer.whole(self.engine))
        events = answer.chunks(self.engine)
        first = await anext(events)  # what is wrong with the request shows here, while the status can still say so
        return StreamingResponse(sse(first, events), media_type="text/event-stream")

    async def _prompt(self, adapter: str | None, messages: list[Message]) -> tuple[Chat, list[int]]:
        """The chat of an adapter, and the ids it makes of messages; beside the event loop, because a template may take its time."""

        def read() -> tuple[Chat, list[int]]:
            chat = self.chats.of(adapter)
            return chat, chat.prompt(messages)

        return await asyncio.to_thread(read)


def adapter_of(request: Request) -> str | None:
    return request.headers.get("x-tuneyard-adapter", "").encode("latin-1").decode("utf-8") or None


class Answer:
    """One chat completion in the making: `n` sequences from one prompt."""

    def __init__(
        self, asked: protocol.ChatRequest, model: str, prompt_ids: list[int], stop_ids: frozenset[int], adapter: str | None
    ) -> None:
        self.asked, self.num_prompt = asked, len(prompt_ids)
        self.head = (f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model)
        self.requests = [
            GenerateRequest(
                prompt_ids=prompt_ids,
                adapter=adapter,
                stop_ids=stop_ids,
                max_tokens=asked.limit,
                temperature=asked.temperature,
                top_p=asked.top_p,
                stop=asked.stops,
                seed=None if asked.seed is None else asked.seed + i,
            )
            for i in range(asked.n)
        ]

    async def whole(self, engine: Engine) -> dict[str, Any]:
        texts, reasons, num_tokens = [""] * self.asked.n, [""] * self.asked.n, 0
        async with aclosing(merged(engine, self.requests)) as events:
            async for index, event in events:
                num_tokens += 1
                texts[index] += event.text
                reasons[index] = event.finish_reason or ""
        return protocol.completion(*self.head, list(zip(texts, reasons, strict=True)), protocol.usage(self.num_prompt, num_tokens))

    async def chunks(self, engine: Engine) -> AsyncGenerator[dict[str, Any], None]:
        num_tokens = 0
        with_usage = self.asked.stream_options.include_usage
        extra = {"usage": None} if with_usage else {}
        begun: set[int] = set()
        async with aclosing(merged(engine, self.requests)) as events:
            async for index, event in events:
                num_tokens += 1
                if index not in begun:
                    begun.add(index)
                    yield protocol.chunk(*self.head, index, {"role": "assistant", "content": "", "refusal": None}) | extra
                if event.text:
                    yield protocol.chunk(*self.head, index, {"content": event.text}) | extra
                if event.finish_reason:
                    yield protocol.chunk(*self.head, index, {}, event.finish_reason) | extra
        if with_usage:
            yield protocol.chunk(*self.head, 0, {}) | {"choices": [], "usage": protocol.usage(self.num_prompt, num_tokens)}


async def merged(engine: Engine, requests: list[GenerateRequest]) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    """The events of several generations as they come, each with its index; closing it closes them all."""
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(aclosing(engine.generate(r))) for r in requests]
        if len(streams) == 1:
            async for event in streams[0]:
                yield 0, event
            return
        pending = {asyncio.ensure_future(anext(s)): i for i, s in enumerate(streams)}
        try:
            while pending:
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    index, event = pending.pop(future), future.result()
                    yield index, event
                    if not event.finish_reason:
                        pending[asyncio.ensure_future(anext(streams[index]))] = index
        finally:
            for future in pending:
                future.cancel()
            await asyncio.gather(*pending, return_exceptions=True)


async def sse(first: dict[str, Any], events: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[str]:
    """Server-sent events; an error that comes after the first of them is one more event."""
    async with aclosing(events):
        yield sse_line(first)
        try:
            async for event in events:
                yield sse_line(event)
        except TuneyardError as error:
            yield sse_line(protocol.error_body(error))
            return
        yield "data: [DONE]\n\n"


def sse_line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
