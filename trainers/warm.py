"""A training worker begins to load torch and the loop the moment its process starts, beside all that Ray does before it calls the loop.

A module of its own: Ray runs `begin` in the new process, which should load nothing else for it.
"""

from __future__ import annotations

import importlib
import threading


def begin() -> None:
    threading.Thread(target=importlib.import_module, args=("trainers.train",), daemon=True).start()
