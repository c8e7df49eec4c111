"""One Ray Serve application: one model, its engine and OpenAI's wire for chat and text completions.

The model is a base, which also answers with adapters over it, or a whole tuned model. The gateway in service/ is the only client: it has
the token, and says by header which name to echo (`x-tuneyard-model`) and which PEFT folder to answer with (`x-tuneyard-adapter`, in UTF-8;
empty = the model as it is).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import orjson
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve import chat_request, completions, protocol
from serve import tools as tool_calls
from serve.chat_answer import ChatAnswer
from serve.chats import Chats
from serve.completions import Completion
from serve.engine import Engine
from serve.engines import open_engine
from serve.heaps import give_back_large, give_back_often
from serve.streams import sse
from serve.tools import Form
from trainers.chat import Chat
from trainers.errors import DataError, TuneyardError, Unavailable, UserError

MAX_OPEN = 256
"""Sequences that one replica answers at a time, waiting ones and those that are read slowly included; more are told to come again."""
QUEUE = 32
"""Open requests of one replica beyond which another is worth its start."""
UPSCALE_DELAY_S, DOWNSCALE_DELAY_S = 10.0, 300.0
"""How long queues are long before replicas are added, and short before some are taken away."""
RETRY_AFTER_S = "1"
SWEEP_S = 2.0
"""Between two looks for adapters that were deleted."""
DRAIN_S = 120.0  # an unloaded model may finish the answers that it has begun; Serve's own 20 s would cut long ones


def build(args: dict[str, Any]) -> Application:
    """For Serve's declarative config (`import_path: serve.app:build`).

    args: `name` (echoed where no header names the model), `model_dir`, `token_file`, and optionally `max_open` (MAX_OPEN), `replicas`
    (`min` and `max` copies, 1 and 1 without it: between them Serve has as many as keep their queues at `queue` open requests each, 32),
    `num_gpus` (that a copy reserves; none without it), `labels` (of the machines that copies may run on) and what
    serve.engines.open_engine takes.
    """

    def asgi() -> Starlette:  # runs in the replica: only there is the model loaded
        give_back_large()
        engine = open_engine(args)
        token = Path(args["token_file"]).read_text(encoding="utf-8").strip()
        return application(engine, Chats(Path(args["model_dir"])), args["name"], token, args.get("max_open", MAX_OPEN))

    bounds = {"min": 1, "max": 1, **args.get("replicas", {})}
    scaling = AutoscalingConfig(
        min_replicas=bounds["min"],
        max_replicas=bounds["max"],
        target_ongoing_requests=args.get("queue", QUEUE),
        metrics_interval_s=2.0,
        look_back_period_s=10.0,
        upscale_delay_s=UPSCALE_DELAY_S,
        downscale_delay_s=DOWNSCALE_DELAY_S,
    )
    # Far more requests reach the replica than it answers: what is too much it says itself, in words that clients understand.
    # A local replica reserves no CPU: a training job beside it would otherwise wait for ever.
    deployment = ray_serve.deployment(
        name="engine",
        max_ongoing_requests=2048,
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": 0, "num_gpus": args.get("num_gpus", 0), "label_selector": args.get("labels", {})},
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    return deployment(ray_serve.ingress(asgi)()).bind()


def application(engine: Engine, chats: Chats, name: str, token: str, max_open: int = MAX_OPEN) -> Starlette:
    """The ASGI application around an engine."""
    server = Server(engine, chats, name, max_open)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sweeping = [asyncio.create_task(server.forget_deleted()), asyncio.create_task(give_back_often())]
        yield
        for task in sweeping:
            task.cancel()
        await asyncio.to_thread(engine.close)

    routes = [
        Route("/healthz", server.healthz),
        Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
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
    headers = {"retry-after": RETRY_AFTER_S} if error.status == 503 else {}
    return JSONResponse(protocol.error_body(error), error.status, headers)


class Server:
    """The routes."""

    def __init__(self, engine: Engine, chats: Chats, name: str, max_open: int) -> None:
        self.engine, self.chats, self.name, self.max_open = engine, chats, name, max_open
        self.num_open = 0
        """Sequences of answers that are not finished, or not yet read to their end."""
        self.adapters: set[str] = set()
        """Folders that were asked for."""

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "name": self.name, **self.engine.stats(), "open": self.num_open})

    async def prompt(self, request: Request) -> Response:
        """The ids that the model would be given for these messages: lets the training side check that it saw the same."""
        asked, adapter = chat_request.parse_messages(await request.body()), self._adapter(request)

        def read() -> list[int]:
            chat = self.chats.of(adapter)
            return self._chat_prompt(chat, asked)[0]

        return JSONResponse({"prompt_ids": await asyncio.to_thread(read)})

    async def chat_completions(self, request: Request) -> Response:
        body = await request.body()
        adapter, model = self._adapter(request), self._model(request)

        def read() -> ChatAnswer:  # beside the event loop, because a template may take its time
            asked = chat_request.parse(body)
            chat = self.chats.of(adapter)
            shown = asked.model_copy(update={"tools": []}) if asked.tool_choice == "none" else asked
            ids, form = self._chat_prompt(chat, shown)
            return ChatAnswer(asked, self.engine, chat, ids, form, model, adapter)

        return await self._respond(await asyncio.to_thread(read))

    async def completions(self, request: Request) -> Response:
        body = await request.body()
        adapter, model = self._adapter(request), self._model(request)

        def read() -> Completion:
            asked = completions.parse(body)
            chat = self.chats.of(adapter)
            for prompt in asked.prompts:
                self._refuse_endless(chat, len(prompt.encode()) if isinstance(prompt, str) else 0, "prompt")
            most = self.engine.context - min(asked.max_tokens, 1)
            prompts = [completions.prompt_ids(chat, prompt, i, most) for i, prompt in enumerate(asked.prompts)]
            return Completion(asked, self.engine, chat, prompts, model, adapter)

        return await self._respond(await asyncio.to_thread(read))

    async def forget_deleted(self) -> None:
        """Unload adapters whose folders are gone, again and again. Every replica sees to its own: a deleted model goes everywhere."""
        while True:
            await asyncio.sleep(SWEEP_S)
            for adapter in [a for a in self.adapters if not Path(a).exists()]:
                self.adapters.discard(adapter)
                await asyncio.to_thread(self.engine.evict, adapter)

    async def _respond(self, answer: ChatAnswer | Completion) -> Response:
        with ExitStack() as held:
            held.enter_context(self._opened(len(answer.requests)))
            if not answer.asked.stream:
                return WireJSON(await answer.whole())
            chunks = answer.chunks()
            first = await anext(chunks)  # what is wrong with the request shows here, while the status can still say so
            return Streamed(sse(first, chunks), held.pop_all())

    @contextmanager
    def _opened(self, count: int) -> Iterator[None]:
        if self.num_open and self.num_open + count > self.max_open:
            raise Unavailable(f"{self.num_open} answers are being made, which is all that this model holds.", "Ask again in a moment.")
        self.num_open += count
        try:
            yield
        finally:
            self.num_open -= count

    def _chat_prompt(self, chat: Chat, asked: chat_request.WithMessages) -> tuple[list[int], Form | None]:
        """Ids of a conversation; and, where it has tools, how the model's template writes calls."""
        messages, tools = asked.plain(), asked.tools_text
        calls = next((i for i, message in enumerate(messages) if "tool_calls" in message), None)
        form = tool_calls.needed(chat, "tools" if tools else f"messages[{calls}].tool_calls") if tools or calls is not None else None
        self._refuse_endless(chat, sum(len(message["content"].encode()) for message in messages), "messages", len(messages))
        try:
            return chat.prompt(messages, tools), form if tools else None
        except DataError as error:  # here nobody trains: it is a request like others that is wrong
            raise UserError(error.message, error.remedy, error.param) from None

    def _refuse_endless(self, chat: Chat, num_bytes: int, param: str, at_least: int = 0) -> None:
        """Refuse what cannot fit the context, whatever its words, before it is cut into tokens."""
        at_least = max(at_least, num_bytes // int(chat.token_bytes.sizes.max()))
        if at_least >= self.engine.context:
            raise UserError(
                f"The prompt has at least {at_least:,} tokens: more than this model's context of {self.engine.context} tokens.",
                "Shorten it.",
                param,
            )

    def _adapter(self, request: Request) -> str | None:
        adapter = request.headers.get("x-tuneyard-adapter", "").encode("latin-1").decode("utf-8") or None
        if adapter:
            self.adapters.add(adapter)
        return adapter

    def _model(self, request: Request) -> str:
        return request.headers.get("x-tuneyard-model") or self.name


class WireJSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class Streamed(StreamingResponse):
    """Server-sent events that hold on to something until the last of them is sent, or the reader has left."""

    def __init__(self, events: AsyncIterator[bytes], held: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)
