"""What stands in the place of Ray Serve and its apps where the gateway alone is tested."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route


class Upstream:
    """In the place of Ray Serve and its apps: keeps what it was asked, and answers as it is told."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.apps: list[str] = []
        self.answer = ""
        self.words = ""
        """What stands before each number that a stream counts."""
        self.closed = threading.Event()
        self.seen: threading.Semaphore | None = None
        """Pieces of a stream that may be sent; None lets one go every 0.2 s."""

    def app(self) -> Starlette:
        paths = ("/{app}/v1/chat/completions", "/{app}/v1/completions")
        return Starlette(routes=[Route(path, self.chat, methods=["POST"]) for path in paths])

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append((dict(request.headers), body))
        self.apps.append(request.path_params["app"])
        if request.url.path.endswith("/v1/completions") and "prompt" in body:
            choice = {"index": 0, "text": " there", "finish_reason": "stop", "logprobs": None}
            return JSONResponse({"id": "c", "object": "text_completion", "created": 1, "model": "x", "choices": [choice]})
        if self.answer == "refuse":
            return JSONResponse({"error": {"message": "no", "type": "invalid_request_error", "param": "stop", "code": "x"}}, 400)
        if self.answer == "starting":
            self.answer = ""
            return PlainTextResponse("Path not found", 404)
        if self.answer == "break":
            return PlainTextResponse("Internal Server Error", 500)
        if self.answer == "think":
            while not await request.is_disconnected():
                await asyncio.sleep(0.05)
            self.closed.set()
        if body.get("stream"):
            return StreamingResponse(self.stream(body), media_type="text/event-stream")
        message = {"role": "assistant", "content": "hello"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return JSONResponse(
            {"id": "c", "object": "chat.completion", "created": 1, "model": request.headers["x-tuneyard-model"], "choices": [choice]}
        )

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            for n in range(1000 if self.answer == "endless" else 3):
                delta = {"index": 0, "delta": {"content": f"{self.words or ''}{n} "}, "finish_reason": None}
                chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": body["model"], "choices": [delta]}
                if self.seen and not await asyncio.to_thread(self.seen.acquire, timeout=120.0):
                    raise AssertionError("the piece before was not passed on")
                yield f"data: {json.dumps(chunk)}\n\n"
                if not self.seen:
                    await asyncio.sleep(0.2)
                if self.answer in ("die", "stop"):
                    yield f"data: {json.dumps(chunk)[:20]}"  # and the rest of it never comes
                    if self.answer == "stop":
                        return
                    raise RuntimeError("the engine's process ends")
            if (body.get("stream_options") or {}).get("include_usage"):
                counts = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
                last = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": body["model"], "choices": [], "usage": counts}
                yield f"data: {json.dumps(last)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.closed.set()
