"""The states of a job on the wire, and which may follow which."""

from __future__ import annotations

from typing import Literal, get_args

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]

NEXT: dict[Status, frozenset[Status]] = {
    "validating_files": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "failed", "cancelled"}),
    "running": frozenset({"queued", "succeeded", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}

FINAL = frozenset(status for status, following in NEXT.items() if not following)
ACTIVE = frozenset(get_args(Status)) - FINAL


def sources_of(target: Status) -> frozenset[Status]:
    """The states from which a job may enter `target`."""
    return frozenset(status for status, following in NEXT.items() if target in following)
