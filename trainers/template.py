"""Chat templates: programs that strangers wrote, run only in a limited child process (`renderer.py`).

`Template.render` gives the text of conversations. `Template.skeleton` gives what all conversations of one shape (the same roles)
have in common, for templates that copy texts without looking at them: then a conversation is rendered by filling blanks.
"""

from __future__ import annotations

import atexit
import json
import marshal
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainers.errors import TemplateError, Unavailable

CPU_S = 2.0
"""CPU time of one render."""
MEMORY_BYTES = 512 << 20
"""What the child may take beyond what it has when it starts."""
TEXT_BYTES = 16 << 20
"""The longest conversation, before and after rendering."""
SOURCE_BYTES = 1 << 20
"""The longest template file."""

_SILENCE_S = 60.0  # no answer for so long: the child does not compute (that is limited by CPU time), it hangs
_CHUNK_BYTES, _CHUNK_ASKS = 1 << 20, 256  # asks sent at once; the child reads them all before it answers, so no pipe can jam
_DEATHS = 3  # a template that broke its limits so often in one call is not asked again in that call
_KILLED = "was stopped from outside again and again"  # by a machine short of memory, say: no template can do that to its process
OUT_OF_MEMORY = 77
"""Exit code of a child that reached its memory limit."""


class Ask(NamedTuple):
    """One conversation to render. Messages are in the form that templates read: role, content, tool_calls with arguments as objects."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    generation_prompt: bool


class Slot(NamedTuple):
    """What a skeleton knows of a message: it has a role and a content, nothing else."""

    role: str
    empty: bool
    """Its content is ""."""


class Blank(NamedTuple):
    """The place of a message's text in a skeleton."""

    message: int
    stripped: bool
    """The template writes `content.strip()`."""


Skeleton = tuple[str | Blank, ...]
"""Literal text and blanks. A message may fill several blanks; an empty one (`Slot.empty`) has none."""


class Builtin(NamedTuple):
    """A template of ours, after a published prompt format."""

    source: str
    control: tuple[str, ...]
    """What the tokenizer must have as special tokens (besides bos and eos)."""
    stop: str
    """The special token that ends an assistant turn; "eos" for the tokenizer's eos token."""


class Template:
    """One chat template. Thread-safe; cheap to build and to pickle, for it lives in the child."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        """`special` (bos_token, eos_token, ...) is handed to the template. Raises TemplateError for invalid Jinja."""
        self.source = source
        self.special = special
        [answer] = _ask("check", source, special, [b""])
        if isinstance(answer, _Failed):
            raise TemplateError(f"The chat template {answer}.", "Mend the template.")

    def __reduce__(self) -> tuple[Any, ...]:
        return Template, (self.source, self.special)

    def render(self, asks: Iterable[Ask]) -> list[str | TemplateError]:
        """The text of each conversation; a TemplateError in the place of one that the template refuses or cannot render in its limits."""
        packed = [_pack(ask) for ask in asks]
        answers = iter(_ask("render", self.source, self.special, [p for p in packed if isinstance(p, bytes)]))
        return [_explained(next(answers) if isinstance(p, bytes) else p) for p in packed]

    def skeleton(self, slots: tuple[Slot, ...], generation_prompt: bool) -> Skeleton | None:
        """What every conversation of this shape renders to, its texts left blank.

        None unless the template was seen to write every text, whole or stripped, without looking at any of them. To be asked
        once for each shape.
        """
        request = marshal.dumps(([tuple(slot) for slot in slots], generation_prompt))
        [answer] = _ask("skeleton", self.source, self.special, [request])
        if isinstance(answer, _Failed) or (parts := json.loads(answer)) is None:
            return None
        return tuple(part if isinstance(part, str) else Blank(*part) for part in parts)


def fill(skeleton: Skeleton, contents: Sequence[str]) -> str:
    """The rendered conversation whose messages have these contents."""

    def text(part: str | Blank) -> str:
        if isinstance(part, str):
            return part
        return contents[part.message].strip() if part.stripped else contents[part.message]

    return "".join(map(text, skeleton))


def load_template(path: Path) -> str:
    """Read a Jinja file. Raises TemplateError if it is missing, too long or not UTF-8."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(SOURCE_BYTES + 1)
        if len(data) > SOURCE_BYTES:
            raise TemplateError(f"The chat template {path} is longer than {SOURCE_BYTES >> 20} MiB.", "Name a Jinja chat template.")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise TemplateError(f"The chat template {path} cannot be read: {error.strerror}.", "Name a Jinja file that exists.") from None
    except UnicodeDecodeError as error:
        raise TemplateError(f"The chat template {path} is not UTF-8: byte {error.start}.", "Save it as UTF-8.") from None


_BUILTIN: dict[str, tuple[tuple[str, ...], str]] = {
    "alpaca": ((), "eos"),
    "chatml": (("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "gemma": (("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "llama2": ((), "eos"),
    "llama3": (("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "mistral": (
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "eos",
    ),
    "vicuna": ((), "eos"),
}


def builtin(name: str) -> Builtin | None:
    """The built-in template of this name."""
    if name not in _BUILTIN:
        return None
    return Builtin(load_template(Path(__file__).with_name("templates") / f"{name}.jinja"), *_BUILTIN[name])


def builtin_names() -> tuple[str, ...]:
    return tuple(_BUILTIN)


class _Failed(NamedTuple):
    """No text; says what the chat template does instead, as the rest of a sentence."""

    why: str

    def __str__(self) -> str:
        return self.why


def _pack(ask: Ask) -> bytes | _Failed:
    try:
        packed = marshal.dumps(tuple(ask))
    except ValueError as error:
        return _Failed(f"cannot take a value that is no JSON ({error})")
    return packed if len(packed) <= TEXT_BYTES else _Failed(f"cannot take a conversation of more than {TEXT_BYTES >> 20} MiB")


def _explained(answer: str | _Failed) -> str | TemplateError:
    if isinstance(answer, str):
        return answer
    return TemplateError(f"The chat template {answer}.", "Change the conversation's messages, or the template.")


# -- the child -------------------------------------------------------------------------------------------------------


class _Died(Exception):
    """The child is gone; says which limit it broke, as `_Failed` does."""


class _Child:
    """The process that runs templates. Requests and answers are `renderer.py`'s."""

    def __init__(self) -> None:
        # It sees nothing of this process's environment but the way to its modules; -S leaves out what site-packages would start.
        environment = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *(p for p in sys.path if p)])}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-P", "-m", "trainers.renderer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.poll = select.poll()
        self.poll.register(self.stdout, select.POLLIN)
        self.buffer = bytearray()
        try:
            self.read(1)
        except _Died:
            raise Unavailable(
                "The process that renders chat templates does not start.", "`python -m trainers.renderer` shows why."
            ) from None

    def send(self, request: bytes) -> None:
        view = memoryview(len(request).to_bytes(8, "little") + request)
        try:
            while view:
                view = view[self.stdin.write(view) :]
        except BrokenPipeError:
            raise _Died(self.stop()) from None

    def read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            if not self.poll.poll(_SILENCE_S * 1000):
                self.stop()
                raise _Died(f"hangs for {_SILENCE_S:.0f} s")
            data = self.stdout.read(1 << 16)
            if not data:
                raise _Died(self.stop())
            self.buffer += data
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def answer(self) -> str | _Failed:
        header = self.read(9)
        size = int.from_bytes(header[1:], "little")
        if size > TEXT_BYTES:  # the child holds itself to this, unless a template has taken it over
            self.stop()
            raise _Died(f"writes more than {TEXT_BYTES >> 20} MiB")
        text = self.read(size).decode("utf-8", "replace")
        return text if header[:1] == b"T" else _Failed(text)

    def stop(self) -> str:
        """End the process; says why it had ended before, if it had."""
        self.process.kill()
        self.stdin.close()
        code = self.process.wait()
        self.stdout.close()
        if code == -signal.SIGPROF:
            return f"takes more than {CPU_S:.0f} s of CPU time"
        if code == OUT_OF_MEMORY:
            return f"needs more than {MEMORY_BYTES >> 20} MiB of memory"
        return _KILLED if code == -signal.SIGKILL else f"ends the process that it runs in (code {code})"


_child: _Child | None = None
_lock = threading.Lock()


def _ask(what: str, source: str, special: dict[str, str], items: list[bytes]) -> list[str | _Failed]:
    """An answer for each item; for one that kills the child, how it did, and those after it are asked again."""
    global _child
    answers: list[str | _Failed] = []
    deaths = 0
    while len(answers) < len(items):
        chunk = _chunk(items, len(answers))
        request = marshal.dumps((what, source, special, chunk))
        with _lock:
            if _child is not None and _child.process.poll() is not None:  # ended between calls: no conversation's fault
                _child.stop()
                _child = None
            if _child is None:
                _child = _Child()
            try:
                _child.send(request)
                for _ in chunk:
                    answers.append(_child.answer())  # noqa: PERF401  those that came before a death count
            except _Died as death:
                _child = None
                deaths += 1
                if str(death) != _KILLED or deaths == _DEATHS:
                    answers.append(_Failed(str(death)))
            except BaseException:  # an interrupt between request and answer: the next answer would be read as another's
                _child.stop()
                _child = None
                raise
        if deaths == _DEATHS:
            given_up = _Failed(f"broke its limits on {_DEATHS} conversations, so the rest were not rendered")
            answers += [given_up] * (len(items) - len(answers))
    return answers


def _chunk(items: list[bytes], start: int) -> list[bytes]:
    size, stop = 0, start
    while stop < len(items) and stop - start < _CHUNK_ASKS and size < _CHUNK_BYTES:
        size += len(items[stop])
        stop += 1
    return items[start:stop]


def _forget() -> None:
    """A forked process must not speak to its parent's child, nor keep it alive."""
    global _child, _lock
    _lock = threading.Lock()
    if _child is not None:
        _child.stdin.close()
        _child.stdout.close()
        _child.process.returncode = 0  # not ours to wait for
        _child = None


def _close() -> None:
    global _child
    with _lock:
        if _child is not None:
            _child.stop()
            _child = None


os.register_at_fork(after_in_child=_forget)
atexit.register(_close)
