"""Which checkpoints there are, which are whole, which is best, and which may go: all told by their manifests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from trainers import vault
from trainers.errors import CheckpointError
from trainers.records import CheckpointRecord, RunDir, checkpoint_name, parse_checkpoint_name
from trainers.spec import CheckpointPart
from trainers.vault import MANIFEST, Stated, Vault


def seal(record: CheckpointRecord) -> str:
    """The manifest's text, which holds the hash of itself (with zeros in the hash's place): a manifest can be damaged, too."""
    text = record.model_copy(update={"sha256": "0" * 64}).model_dump_json(indent=2)
    return text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest())


def unseal(content: bytes) -> CheckpointRecord:
    """The record in a manifest. Raises ValueError where a byte of it has changed."""
    found = re.search(rb'"sha256": "([0-9a-f]{64})"\s*}\s*$', content)
    if found is None or hashlib.sha256(content[: found.start(1)] + b"0" * 64 + content[found.end(1) :]).hexdigest() != found[1].decode():
        raise ValueError("its manifest has changed")
    return CheckpointRecord.model_validate_json(content)


def read_manifest(folder: Path, verify: bool = False) -> CheckpointRecord:
    """The folder's record; with `verify`, after checking every file's size and hash. Raises CheckpointError."""
    place = vault.Folder(folder.parent)
    record = record_of(place, folder.name)
    if verify:
        check_files(place, folder.name, record.files)
    return record


def record_of(place: Vault, name: str) -> CheckpointRecord:
    try:
        return unseal(vault.read(place, name, MANIFEST))
    except (OSError, ValueError):
        raise CheckpointError(f"{name} has no readable manifest.") from None


def check_files(place: Vault, name: str, files: dict[str, Stated]) -> None:
    for file, stated in files.items():
        try:
            source = place.open(name, file)
            whole = source.size == stated["bytes"] and vault.digest(source) == stated["sha256"]
        except OSError:
            whole = False
        if not whole:
            raise CheckpointError(f"{name}/{file} does not match its manifest.")


def readable(place: Vault) -> dict[str, CheckpointRecord]:
    """Checkpoints whose manifest can be read, oldest first: one that was damaged must not stop the run that went on without it."""
    found: dict[str, CheckpointRecord] = {}
    for name in ordered(place.names()):
        with suppress(CheckpointError):
            found[name] = record_of(place, name)
    return found


def ordered(names: Iterable[str]) -> list[str]:
    """Those that name a checkpoint, by step, then attempt."""
    return sorted((n for n in names if parse_checkpoint_name(n)), key=lambda n: parse_checkpoint_name(n) or (0, 0))


def best(run: RunDir, part: CheckpointPart) -> CheckpointRecord | None:
    """The manifest with the lowest validation loss; without validation, the last one."""
    return _best(list(readable(vault.at(run, part)).values()))


def _best(records: list[CheckpointRecord]) -> CheckpointRecord | None:
    judged = [r for r in records if r.valid_loss is not None]
    return min(judged, key=lambda r: (r.valid_loss, -r.step)) if judged else (records[-1] if records else None)  # type: ignore[return-value]


def prune(place: Vault, keep_last: int, keep_best: bool, proven: Collection[str] = (), damaged: Collection[str] = ()) -> list[str]:
    """Delete checkpoints beyond the newest `keep_last` (and the best); returns their names. Adapters stay: they are small, and callable.

    Only whole ones that are not known to be `damaged` count, and nothing is deleted unless one that stays is good: it is in `proven`, or
    is read and hashed now.
    """
    present = readable(place)
    whole = [n for n, record in present.items() if n not in damaged and sizes_match(place, n, record)]
    kept = set(whole[-keep_last:])
    if keep_best and (winner := _best([present[n] for n in whole])):
        kept |= {n for n in whole if present[n] is winner}
    if not any(n in proven or _is_good(place, n, present[n]) for n in ordered(kept)[::-1]):
        return []
    names = ordered({*place.names(), *present})
    before = names[: names.index(ordered(kept)[-1])]  # what has no manifest and is newer may be on its way
    doomed = [n for n in names if n not in kept and (n in present or n in before)]
    for name in doomed:
        place.delete(name)
    return doomed


def sizes_match(place: Vault, name: str, record: CheckpointRecord) -> bool:
    present = place.files(name)
    return all(present.get(file) == stated["bytes"] for file, stated in record.files.items())


def _is_good(place: Vault, name: str, record: CheckpointRecord) -> bool:
    try:
        check_files(place, name, record.files)
    except CheckpointError:
        return False
    return True


def fetch(run: RunDir, part: CheckpointPart, step: int) -> Path:
    """A local folder with the checkpoint of `step`, verified. Where it lies elsewhere it is copied to `checkpoints/.fetched` of the run
    directory, which the caller may delete. Raises CheckpointError where no attempt's is whole."""
    place = vault.at(run, part)
    problem = "there is none"
    for name in reversed([n for n in ordered(place.names()) if n.startswith(checkpoint_name(step, 0)[:-1])]):
        try:
            record = record_of(place, name)
            if isinstance(place, vault.Folder):
                check_files(place, name, record.files)
                return place.root / name
            local = vault.Folder(run.path("checkpoints", ".fetched"))
            with suppress(CheckpointError):
                check_files(local, name, record.files)
                return local.root / name
            vault.copy(place, local, name, record.files)
            check_files(local, name, record.files)
            return local.root / name
        except CheckpointError as error:
            problem = str(error).rstrip(".")
    raise CheckpointError(f"The checkpoint of step {step} cannot be used: {problem}.", "Train again, or use another step.")


def folders(run: RunDir) -> list[Path]:
    """Checkpoints in the run directory by step, then attempt, oldest first. What lacks a manifest is none."""
    place = vault.Folder(run.path("checkpoints"))
    return [place.root / n for n in ordered(place.names()) if (place.root / n / MANIFEST).exists()]
