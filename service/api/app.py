"""The API as one ASGI app."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI

from service.answering import Answering
from service.api import chat, errors, evaluations, files, jobs, models, rating, studies, tuneyard
from service.link import Link
from service.replicas import Replicas
from service.settings import Settings
from service.store import Store


def create_app(settings: Settings, store: Store, link: Link) -> FastAPI:
    """The app over a migrated store; `link` says which cluster serves."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # No read timeout: a long answer may think for minutes before its first byte.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5.0), limits=limits, trust_env=False) as http:
            app.state.http = http
            answering = asyncio.create_task(app.state.answering.run())
            yield
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    app = FastAPI(title="Tuneyard", lifespan=lifespan)
    app.state.settings, app.state.store, app.state.link = settings, store, link
    app.state.answering, app.state.replicas, app.state.callers = Answering(app, store), Replicas(), {}
    for part in (files, jobs, models, chat, tuneyard, evaluations, studies, rating):
        app.include_router(part.router)
    errors.install(app)
    app.add_middleware(errors.Guard, max_body_bytes=settings.max_body_bytes, max_file_bytes=settings.max_file_bytes)
    return app
