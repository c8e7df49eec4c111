"""As much of the Hugging Face hub's HTTP as the `datasets` library asks for, on loopback: public datasets out of memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "c" * 40
"""The only one of every dataset."""

Datasets = Mapping[str, Mapping[str, bytes]]
"""Dataset (`org/name`) -> file -> its bytes."""


@contextmanager
def hub(datasets: Datasets) -> Iterator[str]:
    """Serve them; the URL, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Hub,), {"datasets": datasets}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    datasets: Datasets

    def do_GET(self) -> None:
        is_api, _, rest = urlsplit(self.path).path.rpartition("/datasets/")
        org, name, asked = [*rest.split("/", 2), "", ""][:3]
        files = self.datasets.get(f"{org}/{name}", {})
        file, folder = asked.removeprefix(f"resolve/{COMMIT}/"), asked.removeprefix(f"tree/{COMMIT}").strip("/")
        if not files:
            self._send(404, b"{}", X_Error_Code="RepoNotFound")
        elif not is_api and file in files:
            self._send(200, files[file], ETag=f'"{_oid(files[file])}"', X_Repo_Commit=COMMIT)
        elif is_api and asked in ("", f"revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in files]
            self._send(200, json.dumps({"id": f"{org}/{name}", "sha": COMMIT, "siblings": siblings}).encode())
        elif is_api and (found := _entries(files, folder)):
            self._send(200, json.dumps(found).encode())
        else:
            self._send(404, b"{}", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entries(files: Mapping[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What lies directly in a folder."""
    prefix = f"{folder}/" if folder else ""
    inside = {name.removeprefix(prefix): data for name, data in files.items() if name.startswith(prefix)}
    folders = sorted({name.split("/")[0] for name in inside if "/" in name})
    return [{"type": "directory", "path": prefix + name, "size": 0, "oid": _oid(name.encode())} for name in folders] + [
        {"type": "file", "path": prefix + name, "size": len(data), "oid": _oid(data)} for name, data in inside.items() if "/" not in name
    ]
