"""Who asks: a bearer key names a project, and everything after speaks in that project's name."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from service.answering import Answering
from service.api.errors import Unauthorized
from service.link import Link
from service.settings import Settings
from service.store import Project, Store, key_name

# Those that wait for nothing are `async`: FastAPI would take each of the others to a thread, at a fifth of a millisecond a request.


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


def _caller(key: Annotated[str, Depends(_key)], store: Annotated[Store, Depends(_store)]) -> Project:
    project = store.project_of(key)
    if project is None:
        raise Unauthorized("The API key is not known here.", "Use the key that `tuneyard up` or `tuneyard keys create` printed.")
    return project


def _requested_by(caller: Annotated[Project, Depends(_caller)], key: Annotated[str, Depends(_key)]) -> str:
    return f"project {caller.name}, {key_name(key)}"


async def _answering(request: Request) -> Answering:
    return request.app.state.answering


Config = Annotated[Settings, Depends(_settings)]
Db = Annotated[Store, Depends(_store)]
Cluster = Annotated[Link, Depends(_link)]
Background = Annotated[Answering, Depends(_answering)]
Caller = Annotated[Project, Depends(_caller)]
RequestedBy = Annotated[str, Depends(_requested_by)]
