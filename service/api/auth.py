"""Who asks: a bearer key names a project, and everything after speaks in that project's name."""

from __future__ import annotations

import hashlib
import time
from typing import Annotated

from fastapi import Depends, Request

from service.answering import Answering
from service.api.errors import Unauthorized
from service.api.quick import quickly
from service.link import Link
from service.settings import Settings
from service.store import Project, Store, key_name

KNOWN_S = 1.0
"""How long a key's project is remembered, and so how long a key that was taken back still opens."""
MANY = 1024


# Those that wait for nothing are `async`: FastAPI takes each of the others to a thread and back.


async def _settings(request: Request) -> Settings:
    return request.app.state.settings


async def _store(request: Request) -> Store:
    return request.app.state.store


async def _link(request: Request) -> Link:
    return request.app.state.link


async def _key(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized("There is no API key.", "Send `Authorization: Bearer KEY`; `tuneyard up` prints the first key.")
    return key.strip()


async def _caller(request: Request, key: Annotated[str, Depends(_key)], store: Annotated[Store, Depends(_store)]) -> Project:
    known: dict[bytes, tuple[Project, float]] = request.app.state.callers
    name = hashlib.sha256(key.encode()).digest()  # keys themselves are kept nowhere
    project, until = known.get(name, (None, 0.0))
    if time.monotonic() > until:
        project = await quickly(store.project_of, key)
        known.pop(name, None)
        if project is not None:
            if len(known) >= MANY:
                known.clear()
            known[name] = project, time.monotonic() + KNOWN_S
    if project is None:
        raise Unauthorized("The API key is not known here.", "Use the key that `tuneyard up` or `tuneyard keys create` printed.")
    return project


async def _requested_by(caller: Annotated[Project, Depends(_caller)], key: Annotated[str, Depends(_key)]) -> str:
    return f"project {caller.name}, {key_name(key)}"


async def _answering(request: Request) -> Answering:
    return request.app.state.answering


Config = Annotated[Settings, Depends(_settings)]
Db = Annotated[Store, Depends(_store)]
Cluster = Annotated[Link, Depends(_link)]
Background = Annotated[Answering, Depends(_answering)]
Caller = Annotated[Project, Depends(_caller)]
RequestedBy = Annotated[str, Depends(_requested_by)]
