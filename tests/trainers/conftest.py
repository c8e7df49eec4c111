"""What the tests of the data plane share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainers.spec import Source


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Source]:
    """Write a file and return it as a source."""

    def put(content: str | bytes, name: str = "data.jsonl", **more: Any) -> Source:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Source(path=str(path), **more)

    return put
