"""What the command line needs over HTTP: the openai client, and our own additions to the wire."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from service.states import FINAL
from trainers.errors import UserError
from trainers.spec import JobSpec

Json = dict[str, Any]


@dataclass(frozen=True)
class Update:
    """One look at a job: the job, its new events (oldest first), and what it does now."""

    job: Json
    events: list[Json]
    detail: Json


class Client:
    """A service, by its base_url and a key."""

    def __init__(self, base_url: str, key: str) -> None:
        self.openai = OpenAI(base_url=base_url, api_key=key)

    @classmethod
    def find(cls, home: Path) -> Client:
        """The service that OPENAI_BASE_URL and OPENAI_API_KEY name, else the one that runs on `home`."""
        if url := os.environ.get("OPENAI_BASE_URL"):
            if not (key := os.environ.get("OPENAI_API_KEY")):
                raise UserError(
                    "OPENAI_BASE_URL is set, but OPENAI_API_KEY is not.", "Set both, or neither to use the service of the home."
                )
            return cls(url, key)
        try:
            service = json.loads((home / "service.json").read_text(encoding="utf-8"))
            return cls(service["base_url"], (home / "key").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"No service runs on {home}.", "Start it with `tuneyard up`, or set OPENAI_BASE_URL and OPENAI_API_KEY."
            ) from None

    def get(self, path: str) -> Json:
        return self.openai.get(path, cast_to=object)  # type: ignore[return-value]

    def post(self, path: str, body: Json | None = None) -> Json:
        return self.openai.post(path, cast_to=object, body=body)  # type: ignore[return-value]

    def submit(self, spec: JobSpec) -> Json:
        """Upload the files that the spec names, each once, and create the job. URLs go as they are: the cluster reads them."""
        ids: dict[str, str] = {}

        def upload(path: str) -> str:
            if "://" in path:
                return path
            if path not in ids:
                file = Path(path)
                if not file.is_file():
                    raise UserError(f"{path} is not a file of this machine.", "Name a local file: it is uploaded from here.")
                ids[path] = self.openai.files.create(file=file, purpose="fine-tune").id
            return ids[path]

        sent = spec.with_paths(upload)
        job = self.openai.fine_tuning.jobs.create(
            model=spec.model.base, training_file=sent.data.train[0].path, extra_body={"job": sent.model_dump(mode="json")}
        )
        return job.to_dict()

    def events(self, job_id: str, known: set[str]) -> list[Json]:
        """A job's events that are not in `known` (which then holds them), oldest first."""
        fresh = []
        for event in self.openai.fine_tuning.jobs.list_events(job_id, limit=100):
            if event.id in known:
                break
            known.add(event.id)
            fresh.append(event.to_dict())
        return fresh[::-1]

    def watch(self, job_id: str, poll_s: float = 0.5) -> Iterator[Update]:
        """Look at a job until it is final; the last update has the last events."""
        known: set[str] = set()
        while True:
            job = self.get(f"/fine_tuning/jobs/{job_id}")
            yield Update(job, self.events(job_id, known), self.get(f"/tuneyard/jobs/{job_id}"))
            if job["status"] in FINAL:
                return
            time.sleep(poll_s)
