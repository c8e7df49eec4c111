"""Which of a model's replicas is asked: the one that answers the fewest requests of this gateway."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Replicas:
    """The requests that are open at each address. One event loop uses it."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    @contextmanager
    def chosen(self, addresses: Sequence[str], adapter: str) -> Iterator[str]:
        """One of the addresses, held while the request is open. Between equals an adapter goes where it went before: it is loaded there."""

        def rank(address: str) -> tuple[int, int]:
            return self._open[address], zlib.crc32(f"{address} {adapter}".encode())

        address = min(addresses, key=rank)
        self._open[address] += 1
        try:
            yield address
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]  # addresses come and go
