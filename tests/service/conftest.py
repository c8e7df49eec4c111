"""Fixtures of the service tests; the parts they are made of are in servicekit.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servicekit import Service, service_on


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose cluster does not answer: all that the API does alone. Tests share it, each with projects of its own."""
    with service_on(tmp_path_factory.mktemp("home")) as service:
        yield service


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Service]:
    """The same for one test."""
    with service_on(tmp_path) as service:
        yield service


@pytest.fixture
def tuneyard() -> list[str]:
    """The command line of this checkout."""
    return [sys.executable, "-m", "service.cli"]
