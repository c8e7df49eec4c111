"""The states of a job on the wire, and which may follow which."""

from __future__ import annotations

from typing import Literal, get_args

Status = Literal["validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"]
"""`pausing` and `paused` are seen only after an explicit pause: clients in the field know the other six."""

NEXT: dict[Status, frozenset[Status]] = {
    "validating_files": frozenset({"queued", "paused", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "failed", "cancelled"}),
    "running": frozenset({"queued", "pausing", "succeeded", "failed", "cancelled"}),
    "pausing": frozenset({"paused", "running", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}

FINAL = frozenset(status for status, following in NEXT.items() if not following)
ACTIVE = frozenset(get_args(Status)) - FINAL


def sources_of(target: Status) -> frozenset[Status]:
    """The states from which a job may enter `target`."""
    return frozenset(status for status, following in NEXT.items() if target in following)
