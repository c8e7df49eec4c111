"""The child process that runs chat templates: `python -m trainers.renderer`, started by `template.py`. It ends when its stdin does.

It can open no file and no socket, and has limits on memory (for good) and CPU time (for each render), which the kernel enforces,
so that a template is stopped in the middle of a C function too.

Request: 8 bytes of length, then a marshalled (what, template source, special tokens, items); read whole before the first answer.
Answers, one for each item, in order: "T" (text) or "E" (error), 8 bytes of length, UTF-8.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import marshal
import os
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import jinja2

from trainers.sandbox import Environment
from trainers.template import CPU_S, MEMORY_BYTES, OUT_OF_MEMORY, TEXT_BYTES
from trainers.trace import trace

_ERROR_CHARACTERS = 500


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    return Environment().from_string(source)


def _check(source: str, special: dict[str, str], item: bytes) -> str:
    _compiled(source)
    return ""


def _render(source: str, special: dict[str, str], item: bytes) -> str:
    messages, tools, generation_prompt = marshal.loads(item)
    template = _compiled(source)
    return template.render(messages=messages, tools=tools, documents=None, add_generation_prompt=generation_prompt, **special)


def _skeleton(source: str, special: dict[str, str], item: bytes) -> str:
    slots, generation_prompt = marshal.loads(item)
    return json.dumps(trace(source, special, slots, generation_prompt))


_WHAT = {
    "check": (_check, "is not valid Jinja"),
    "render": (_render, "does not render the conversation"),
    "skeleton": (_skeleton, "has no skeleton"),
}


def _answer(what: str, source: str, special: dict[str, str], item: bytes) -> tuple[bytes, bytes]:
    do, failure = _WHAT[what]
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        data = do(source, special, item).encode()
        if len(data) > TEXT_BYTES:
            return b"E", f"writes more than {TEXT_BYTES >> 20} MiB".encode()
        return b"T", data
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # a fresh process is surer than this one's scattered memory
    except Exception as error:  # a template is a program: it may raise anything
        said = type(error).__name__
        with contextlib.suppress(Exception):
            said = " ".join(str(error).split()).rstrip(".") or said
        return b"E", f"{failure}: {said[:_ERROR_CHARACTERS]}".encode("utf-8", "replace")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; when it ends, so does stdin
    with contextlib.suppress(jinja2.TemplateError):  # what Python and Jinja load late is loaded now
        _compiled(r"{{ '\n' | tojson | wordwrap | pprint }}{{ raise_exception('') }}").render()
    gc.collect()
    gc.freeze()
    for what in ("RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NPROC"):
        resource.setrlimit(getattr(resource, what), (0, 0))
    if sys.platform == "linux":  # elsewhere kernels do not enforce it
        with Path("/proc/self/statm").open() as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    answers.write(b"!")  # started
    answers.flush()
    while size := requests.read(8):
        what, source, special, items = marshal.loads(requests.read(int.from_bytes(size, "little")))
        for item in items:
            kind, data = _answer(what, source, special, item)
            answers.write(kind + len(data).to_bytes(8, "little") + data)
            answers.flush()  # at once: what came before a death counts


if __name__ == "__main__":
    _limit()
    with contextlib.suppress(BrokenPipeError):
        main(sys.stdin.buffer, sys.stdout.buffer)
