"""/v1/files: what jobs read, and the results they leave."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, UploadFile
from fastapi.responses import FileResponse

from service.api.auth import Caller, Config, Db
from service.api.errors import NotFound, TooLarge
from service.store import File, Project, Store, new_id
from trainers.errors import UserError
from trainers.records import sync_folder

router = APIRouter(prefix="/v1/files")

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")


def to_wire(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "expires_at": int(file.expires_at) if file.expires_at else None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",  # content is judged by the job that reads it
        "status_details": None,
    }


def existing(store: Store, project: Project, file_id: str, param: str = "file_id") -> File:
    """The project's file of this id, or NotFound."""
    file = store.file(project.id, file_id)
    if file is None:
        raise NotFound(f"There is no file `{file_id}`.", "List yours with GET /v1/files.", param)
    return file


@router.post("")
def create(
    settings: Config,
    store: Db,
    caller: Caller,
    file: UploadFile,
    purpose: Annotated[str, Form()],
    anchor: Annotated[str | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=2_592_000)] = None,
) -> dict[str, Any]:
    if purpose not in PURPOSES:
        raise UserError(f"`purpose` is `{purpose}`.", f"Use one of: {', '.join(PURPOSES)}.", "purpose")
    if anchor is not None and anchor != "created_at":
        raise UserError(f"`expires_after[anchor]` is `{anchor}`.", "Use `created_at`.", "expires_after.anchor")
    if (file.size or 0) > settings.max_file_bytes:
        raise TooLarge(f"The file has {file.size} bytes, more than {settings.max_file_bytes}.", "Split it.", "file")
    id = new_id("file-")
    name = PurePath((file.filename or "").replace("\\", "/")).name or "file"
    path = settings.files / id / f"content{_suffixes(name)}"
    size = _save(file, path)
    now = time.time()
    row = File(
        id=id,
        project_id=caller.id,
        filename=name,
        path=str(path.relative_to(settings.home)),
        bytes=size,
        purpose=purpose,
        created_at=now,
        expires_at=now + seconds if seconds else None,
    )
    store.add_file(row)
    return to_wire(row)


@router.get("")
def list_files(
    store: Db,
    caller: Caller,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    files, more = store.files(caller.id, purpose=purpose, after=after, limit=limit, newest_first=order == "desc")
    ends = {"first_id": files[0].id if files else None, "last_id": files[-1].id if files else None}
    return {"object": "list", "data": [to_wire(f) for f in files], "has_more": more, **ends}


@router.get("/{file_id}")
def retrieve(store: Db, caller: Caller, file_id: str) -> dict[str, Any]:
    return to_wire(existing(store, caller, file_id))


@router.delete("/{file_id}")
def delete(settings: Config, store: Db, caller: Caller, file_id: str) -> dict[str, Any]:
    file = existing(store, caller, file_id)
    store.delete_file(caller.id, file.id)  # first: a row without content would be worse than content without a row
    shutil.rmtree((settings.home / file.path).parent, ignore_errors=True)
    return {"id": file.id, "object": "file", "deleted": True}


@router.get("/{file_id}/content")
def content(settings: Config, store: Db, caller: Caller, file_id: str) -> FileResponse:
    file = existing(store, caller, file_id)
    return FileResponse(settings.home / file.path, media_type="application/octet-stream", filename=file.filename)


def _suffixes(name: str) -> str:
    """The name's endings, which readers go by, if they are plain; nothing else of a user's name reaches the disk."""
    return "".join(s for s in PurePath(name).suffixes[-2:] if re.fullmatch(r"\.[A-Za-z0-9]{1,8}", s)).lower()


def _save(upload: UploadFile, path: Path) -> int:
    """Write the upload whole and durable; its size in bytes."""
    path.parent.mkdir(parents=True)
    with path.open("wb") as output:
        shutil.copyfileobj(upload.file, output, 2**20)
        output.flush()
        os.fsync(output.fileno())
    sync_folder(path.parent)
    return path.stat().st_size
