"""Where the service lives and what it may do: one frozen object, read from the environment once."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainers.errors import UserError
from trainers.fetch import default_models


class Settings(BaseModel):
    """Every field can be set as TUNEYARD_<NAME>, for example TUNEYARD_PORT=9000."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    home: Path
    """All that the service owns: database, keys, files, runs, token stores."""
    models: Path
    """Base models, shared by all homes of a user: they are the same everywhere."""
    host: str = "127.0.0.1"
    """Address the API listens on."""
    port: int = 8790
    """Port the API listens on."""
    database: str = ""
    """SQLAlchemy URL; a SQLite file in the home when empty."""
    ray_address: str | None = None
    """Dashboard of a cluster that exists; None starts a local one."""
    ray_token: str | None = None
    """Bearer token of that cluster."""
    serve_port: int = 8000
    """Port of Ray Serve's proxy on the cluster (a local cluster gets a free one)."""
    driver: str = "-m service.launch"
    """What Python runs for one attempt of a job; gets RUN_DIR --attempt N."""
    poll_s: float = 1.0
    """Seconds between two looks of the runner at the world."""
    backoff_s: float = 2.0
    """Pause before the first new attempt after a lost worker; four times longer each time after."""
    chat_wait_s: float = 60.0
    """How long a chat request waits for a model that is being loaded."""
    max_model_bytes: int = 16 * 2**30
    """Whole tuned models (full fine-tuning, DoRA, QLoRA) that are loaded at a time, in bytes of their weights: beyond it, the least
    recently asked are unloaded. One is always loaded, however large."""
    serve_replicas: int = Field(default=1, ge=1)
    """Most copies of one base. Ray Serve adds copies where each has more than `serve_queue` open requests, and takes them away again."""
    serve_queue: int = Field(default=32, ge=1)
    """Open requests of one copy beyond which another is started, where there may be more."""
    serve_gpus: float = Field(default=0, ge=0)
    """GPUs that each copy reserves; 0.5 lets two share one."""
    serve_labels: str = ""
    """Labels of the machines that copies may run on, as Ray's nodes carry them: `ray.io/accelerator-type=A10G,pool=serve`."""
    gpu_priority: Literal["serve", "train"] = "serve"
    """Who goes first where jobs and served models share GPUs: with `serve`, a job waits until GPUs are free; with `train`, models that
    nobody has asked for in the last minute are unloaded while a job waits, and loaded again when they are asked or GPUs are free."""
    data_urls: str = ""
    """URL prefixes, separated by commas, that jobs may read data from besides uploaded files: `s3://team-data/sft/,hf://`. The cluster
    reads them with its own credentials, so whoever may use the service may train on what lies there."""
    checkpoint_urls: str = ""
    """URL prefixes, separated by commas, below which jobs may keep their checkpoints (`checkpoint.to`): `s3://team-runs/`. The cluster
    writes there with its own credentials."""
    judge_urls: str = ""
    """URL prefixes, separated by commas, of models that may judge answers: `https://judge.example/v1`. They get the key that the service's
    environment holds as TUNEYARD_JUDGE_KEY."""
    max_file_bytes: int = 512 * 2**20
    """Largest upload."""
    max_body_bytes: int = 16 * 2**20
    """Largest request that is not an upload."""

    @classmethod
    def load(cls, **given: Any) -> Settings:
        """Settings from the arguments that are not None, then the environment, then the defaults."""
        values: dict[str, Any] = {"home": Path.home() / ".tuneyard", "models": default_models()}
        for name in cls.model_fields:
            if value := os.environ.get(f"TUNEYARD_{name.upper()}"):
                values[name] = value
        values.setdefault("ray_token", os.environ.get("RAY_AUTH_TOKEN"))
        values |= {name: value for name, value in given.items() if value is not None}
        values |= {name: Path(values[name]).expanduser().resolve() for name in ("home", "models")}
        try:
            return cls(**values)
        except ValueError as error:
            raise UserError(f"A TUNEYARD_* setting is wrong: {' '.join(str(error).split())}", "Change or unset it.") from None

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.home / 'tuneyard.db'}"

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def grants(self, path: str) -> bool:
        """Whether a job may read this URL."""
        return _below(path, self.data_urls)

    def grants_checkpoints(self, url: str) -> bool:
        """Whether a job may keep its checkpoints at this URL."""
        return _below(url, self.checkpoint_urls)

    def grants_judge(self, url: str) -> bool:
        """Whether an evaluation may let the model at this URL judge."""
        return _below(url, self.judge_urls)

    @property
    def key_file(self) -> Path:
        return self.home / "key"

    @property
    def files(self) -> Path:
        return self.home / "files"

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    @property
    def serving(self) -> dict[str, Any]:
        """What serve.app.build's args say of each copy of a model."""
        pairs = (pair.partition("=") for pair in self.serve_labels.split(",") if pair.strip())
        labels = {name.strip(): value.strip() for name, _, value in pairs}
        return {"queue": self.serve_queue, "num_gpus": self.serve_gpus, "labels": labels}

    def stores(self, project_id: str) -> Path:
        """Token stores are never shared between projects: a hit would tell one that another has the same data."""
        return self.home / "stores" / project_id

    @property
    def serve_token_file(self) -> Path:
        """File with the token between the gateway and the serving apps."""
        return self.home / "serve.token"


def _below(url: str, prefixes: str) -> bool:
    """Whether the URL begins with one of these prefixes, and goes nowhere else from there."""
    return any("://" in prefix and url.startswith(prefix) and ".." not in url for prefix in map(str.strip, prefixes.split(",")))


def make_home(settings: Settings) -> None:
    """Create the home's folders and the serving token; readable by their owner only."""
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    for folder in (settings.files, settings.runs):
        folder.mkdir(exist_ok=True)
    if not settings.serve_token_file.exists():
        write_secret(settings.serve_token_file, secrets.token_hex(32))


def write_secret(file: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first moment on."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as output:
        output.write(text)
