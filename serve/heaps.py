"""Memory that was freed goes back to the system: glibc keeps it, in a heap of its own for each thread, and a replica runs for weeks."""

from __future__ import annotations

import asyncio
import ctypes
from contextlib import suppress

GIVE_BACK_S = 30.0
"""Between two times; one takes some hundredths of a second."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


async def give_back_often() -> None:
    while True:
        await asyncio.sleep(GIVE_BACK_S)
        await asyncio.to_thread(give_back)


def give_back() -> None:
    """Return to the system what was freed. Each thread allocates from a heap of its own, and glibc keeps all that each ever needed: a few
    large bodies, read by one thread after the other, would stay for good."""
    with suppress(OSError, AttributeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def give_back_large() -> None:
    """Have this process return large blocks at once, and the free ends of its heaps. By itself, glibc keeps the larger ones the larger they
    were: up to 32 MB a block and 64 MB a heap."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 4 << 20)  # a decoding step's activations are smaller
        libc.mallopt(M_TRIM_THRESHOLD, 8 << 20)
