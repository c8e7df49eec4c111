"""`tuneyard chat`: talk to a model, or to two side by side; one question from a pipe."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import openai
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from trainers.errors import TuneyardError, UserError

HELP = """/reset          forget what was said
/system TEXT    a new system prompt (none without TEXT), from here on
/set NAME VALUE temperature, top_p, max_tokens or seed; `/set NAME` unsets it
/show           what is set, and the conversation so far
/help           this
/quit           leave (so does Ctrl-D); Ctrl-C stops an answer"""

SETTINGS: dict[str, Callable[[str], float]] = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal would obey instead of showing it."""
REDRAW_S = 0.05
TAIL_LINES = 2
"""Of the terminal's height that a growing answer leaves free: what is taller than the screen cannot be drawn again."""


@dataclass
class Talk:
    """One model's side of the conversation."""

    model: str
    said: list[dict[str, str]] = field(default_factory=list)
    """Messages after the system prompt."""


@dataclass
class Chat:
    """A conversation with one model or two. All that it needs of the outside: a client, what to write on, and where lines come from."""

    client: openai.OpenAI
    models: list[str]
    console: Console
    system: str | None = None
    settings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.talks = [Talk(model) for model in self.models]

    def run(self, lines: Iterator[str]) -> None:
        """Answer line after line until there is none, or one says to leave."""
        if self.console.is_terminal:
            self.console.print(f"[dim]{' and '.join(self.models)}. /help tells what else there is; Ctrl-D leaves.[/dim]")
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word in ("/quit", "/exit"):
                return
            try:
                if word.startswith("/"):
                    self._command(word, rest.strip())
                elif line.strip():
                    self.ask(line)
            except (TuneyardError, openai.APIError) as error:
                told = error.body.get("message") if isinstance(error, openai.APIStatusError) and isinstance(error.body, dict) else error
                self.console.print(f"error: {told}", style="red", markup=False)

    def ask(self, question: str) -> None:
        """Put a question to all models and show their answers as they come. Ctrl-C keeps what was said so far."""
        answers = [_Answer(self.client, talk.model, self._messages(talk, question), self.settings) for talk in self.talks]
        try:
            (self._show_one if len(answers) == 1 else self._show_beside)(answers)
        except KeyboardInterrupt:
            self.console.print("\n[dim](stopped)[/dim]")
        finally:
            for answer in answers:
                answer.stop()
        for talk, answer in zip(self.talks, answers, strict=True):
            if answer.text:
                talk.said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]
        if error := next((answer.error for answer in answers if answer.error), None):
            raise error

    def _messages(self, talk: Talk, question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *talk.said, {"role": "user", "content": question}]

    def _show_one(self, answers: list[_Answer]) -> None:
        [answer] = answers
        shown = 0
        while True:
            done = answer.done.wait(REDRAW_S)
            text = answer.text
            if len(text) > shown:
                self.console.file.write(text[shown:])
                self.console.file.flush()
                shown = len(text)
            if done and shown == len(answer.text):
                break
        if shown:
            self.console.file.write("\n")
        if self.console.is_terminal and answer.told:
            self.console.print(f"[dim]{answer.told}[/dim]")

    def _show_beside(self, answers: list[_Answer]) -> None:
        if not self.console.is_terminal:
            for answer in answers:
                answer.done.wait()
                self.console.print(f"== {answer.model}", markup=False)
                self.console.file.write(answer.text + "\n")
            return
        with Live(self._panels(answers, growing=True), console=self.console, auto_refresh=False, transient=True) as live:
            while not all(answer.done.is_set() for answer in answers):
                live.update(self._panels(answers, growing=True), refresh=True)
                time.sleep(REDRAW_S)
        self.console.print(self._panels(answers, growing=False))

    def _panels(self, answers: list[_Answer], growing: bool) -> Group:
        """The answers in columns; while they grow, as much of their ends as the screen has room for."""
        width = self.console.width // len(answers)
        panels = []
        for answer in answers:
            text = Text(answer.text)
            if growing:
                lines = text.wrap(self.console, width - 4)
                text = Text("\n").join(lines[-(self.console.height - TAIL_LINES - 3) :])
            panels.append(Panel(text, title=Text(answer.model), subtitle=answer.told or None, width=width))
        return Group(Columns(panels, padding=0, expand=False))

    def _command(self, word: str, rest: str) -> None:
        if word == "/help":
            self.console.print(HELP, style="dim", markup=False)
        elif word == "/reset":
            for talk in self.talks:
                talk.said.clear()
            self.console.print("[dim]Forgotten.[/dim]")
        elif word == "/system":
            self.system = rest or None
            self.console.print(f"[dim]{'System prompt set.' if rest else 'No system prompt.'}[/dim]")
        elif word == "/set":
            name, _, value = rest.partition(" ")
            self._set(name, value.strip())
        elif word == "/show":
            self._show()
        else:
            raise UserError(f"There is no command `{word}`.", "/help lists them.")

    def _set(self, name: str, value: str) -> None:
        if name not in SETTINGS:
            raise UserError(f"There is no setting `{name}`.", f"There are {', '.join(SETTINGS)}.")
        if not value:
            self.settings.pop(name, None)
            return
        try:
            self.settings[name] = SETTINGS[name](value)
        except ValueError:
            raise UserError(f"`{value}` is no value of {name}.", "Give a number.") from None

    def _show(self) -> None:
        told = {"system": self.system, **self.settings}
        self.console.print(", ".join(f"{name}: {value}" for name, value in told.items() if value is not None), style="dim", markup=False)
        for talk in self.talks:
            self.console.print(f"== {talk.model}", style="dim", markup=False)
            for message in talk.said:
                self.console.print(f"{message['role']}: {message['content']}", markup=False)


def typed() -> Iterator[str]:
    """Lines from the terminal; Ctrl-C empties the line, Ctrl-D ends."""
    with contextlib.suppress(ImportError):  # arrow keys and history
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        yield line


class _Answer:
    """An answer that comes in on a thread of its own."""

    def __init__(self, client: openai.OpenAI, model: str, messages: list[dict[str, str]], settings: dict[str, float]) -> None:
        self.model = model
        self.text = ""
        self.told = ""
        """How many tokens, how fast, once it is known."""
        self.error: openai.APIError | None = None
        self.done = threading.Event()
        self._stopped = threading.Event()
        self._ask = lambda: client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
            **settings,  # type: ignore[arg-type]
        )
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Read no further; the model stops when the connection closes, at the next piece."""
        self._stopped.set()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            with self._ask() as stream:
                for chunk in stream:
                    if self._stopped.is_set():
                        return  # which closes the connection
                    self.text += _CONTROL.sub("", "".join(choice.delta.content or "" for choice in chunk.choices))
                    if chunk.usage:
                        took = time.monotonic() - began
                        count = chunk.usage.completion_tokens
                        self.told = f"{count} tokens, {count / took:.0f}/s"
        except openai.APIError as error:
            self.error = error
        finally:
            self.done.set()
