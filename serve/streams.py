"""Several generations as one stream of events, and server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import orjson

from serve.engine import Engine, GenerateRequest, PromptEvent, TokenEvent
from serve.protocol import error_body
from trainers.errors import TuneyardError, Unavailable

log = logging.getLogger(__name__)

Event = TokenEvent | PromptEvent


async def merged(engine: Engine, requests: list[GenerateRequest]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of several generations as they come, each with its index; closing it closes them all."""
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(aclosing(engine.generate(r))) for r in requests]
        if len(streams) == 1:
            async for event in streams[0]:
                yield 0, event
            return
        pending = {asyncio.ensure_future(anext(s, None)): i for i, s in enumerate(streams)}
        try:
            while pending:
                done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    index, event = pending.pop(future), future.result()
                    if event is not None:
                        pending[asyncio.ensure_future(anext(streams[index], None))] = index
                        yield index, event
        finally:
            for future in pending:
                future.cancel()
            await asyncio.gather(*pending, return_exceptions=True)


async def sse(first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[bytes]:
    """Server-sent events; an error that comes after the first of them is one more event, and the last."""
    async with aclosing(chunks):
        yield sse_line(first)
        try:
            async for chunk in chunks:
                yield sse_line(chunk)
        except Exception as error:
            yield sse_line(error_body(as_told(error)))
            return
        yield b"data: [DONE]\n\n"


def as_told(error: Exception) -> TuneyardError:
    """The error as a client may see it. A fault of ours is logged."""
    if isinstance(error, TuneyardError):
        return error
    log.error("an answer failed", exc_info=error)
    return Unavailable(f"The serving app failed ({type(error).__name__}).", "Its log says more; ask again.")


def sse_line(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
