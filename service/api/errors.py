"""Every failure in one shape: {"error": {"message", "type", "param", "code"}}, with an x-request-id."""

from __future__ import annotations

import logging
import uuid
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainers.errors import TuneyardError, UserError

log = logging.getLogger("tuneyard.api")


class NotFound(UserError):
    """No such object in the caller's project."""

    code = "not_found"
    status: ClassVar[int] = 404


class Unauthorized(UserError):
    """No key, or one that nobody was given."""

    code = "invalid_api_key"
    status: ClassVar[int] = 401


class TooLarge(UserError):
    """The request's body is larger than it may be."""

    code = "request_too_large"
    status: ClassVar[int] = 413


def body(status: int, message: str, code: str | None, param: str | None = None, remedy: str = "") -> dict[str, Any]:
    """The error object as clients expect it; `remedy` repeats the end of the message for those who show it apart."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code} | ({"remedy": remedy} if remedy else {})}


def install(app: FastAPI) -> None:
    """Give the app these answers."""

    @app.exception_handler(TuneyardError)
    async def known(_: Request, error: TuneyardError) -> JSONResponse:
        headers = {"retry-after": "5"} if error.status == 503 else {}
        return JSONResponse(body(error.status, str(error), error.code, error.param, error.remedy), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first, *others = error.errors()
        if first["type"] == "json_invalid":
            return JSONResponse(body(400, "The body is not JSON.", "invalid_request"), 400)
        param = _place(first) or None
        # The members of a union complain one by one, at the same place.
        rules = dict.fromkeys(e["msg"] for e in (first, *others) if _place(e) == _place(first))
        told = (
            f"`{param}` is missing."
            if first["type"] == "missing" and param
            else f"{f'`{param}`' if param else 'The body'}: {'; or '.join(rules)}."
        )
        return JSONResponse(body(400, told, "invalid_request", param), 400)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> JSONResponse:
        told = {404: f"There is nothing at {request.url.path}.", 405: f"{request.method} is not possible at {request.url.path}."}
        return JSONResponse(body(error.status_code, told.get(error.status_code, str(error.detail)), None), error.status_code, error.headers)


def _place(error: dict[str, Any]) -> str:
    """The field that a complaint is about, without the names of union members ("literal['auto']", "constrained-int")."""
    parts = [str(part) for part in error["loc"][1:]]  # the first says body or query
    return ".".join(
        part for part in parts if "'" not in part and not part.startswith("constrained-") and part not in ("int", "float", "str")
    )


class Guard:
    """Outermost layer: names each request, bounds its body, and turns a bug into a plain 500 (the trace is logged, not sent)."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_file_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_file_bytes = max_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        upload = scope["method"] == "POST" and scope["path"] == "/v1/files"
        limit = self.max_file_bytes + 2**20 if upload else self.max_body_bytes  # 1 MiB for the multipart frame
        started = False
        received = 0

        async def named(message: Message) -> None:
            nonlocal started
            if received > limit and not started:
                return  # whatever the app makes of its cut-off body, the answer is ours, below
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise TooLarge(f"The request has more than {limit} bytes.")
            return message

        async def answer(status: int, message: str, code: str) -> None:
            headers = {"x-request-id": request_id, "connection": "close"}
            await JSONResponse(body(status, message, code), status, headers)(scope, receive, send)

        try:
            await self.app(scope, counted, named)
        except Exception:
            if started:
                raise
            if received <= limit:
                log.exception("%s %s %s failed.", request_id, scope["method"], scope["path"])
                await answer(500, f"Something went wrong here; the log has it under {request_id}.", "internal_error")
        if received > limit and not started:
            await answer(413, f"The request has more than {limit} bytes. Send less at a time.", TooLarge.code)
