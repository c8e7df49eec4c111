"""Short questions to the database beside the event loop, two at a time.

With a thread for each of 32 requests, Python's one lock goes round between them and they pass each other: the slowest took three times the
median. What may take long keeps the threads that FastAPI gives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

T = TypeVar("T")
AT_ONCE = 2

_limiter: RunVar[CapacityLimiter] = RunVar("tuneyard.quick")  # one for each event loop


async def quickly(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What the function returns."""
    limiter = _limiter.get(None)
    if limiter is None:
        _limiter.set(limiter := CapacityLimiter(AT_ONCE))
    return await to_thread.run_sync(partial(function, *args, **kwargs), limiter=limiter)
