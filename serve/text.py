"""Token ids to text while they arrive: no half characters, no text beyond a stop string."""

from __future__ import annotations

import json
from collections.abc import Callable

from trainers.chat import Chat

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for bytes that are not (yet) a character
SPACE_MARK = "\u2581".encode()


class AnswerText:
    """The text of one answer. The deltas, joined, equal `decode(all ids)` up to the first stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        # What an id says can depend on the one before it, so a few ids are decoded again each time: those from `start` on,
        # of whose text `shown` characters were passed on. Ids before `clean` end in a whole character.
        self._start, self._clean, self._shown = 0, 0, 0
        self._held = ""
        self.stopped = False
        """A stop string was met; the text is complete."""

    def push(self, id: int) -> str:
        """The text that is now certain to belong to the answer."""
        self._ids.append(id)
        text = self._decode(self._ids[self._start :])
        whole = text.rstrip(BROKEN)
        delta, self._shown = whole[self._shown :], len(whole)
        if whole == text:
            self._advance()
        return self._cut(delta, last=False)

    def flush(self) -> str:
        """The rest of the text, at the end of the answer."""
        return self._cut(self._decode(self._ids[self._start :])[self._shown :], last=True)

    def _advance(self) -> None:
        """Everything is a whole character: keep only the ids since the last such point, as context."""
        self._start, self._clean = self._clean, len(self._ids)
        self._shown = len(self._decode(self._ids[self._start :]))

    def _cut(self, delta: str, last: bool) -> str:
        text = self._held + delta
        self._held = ""
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if not last:
            keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return text


def pieces(chat: Chat) -> list[bytes]:
    """What each token adds to a text, as bytes: nothing for control tokens, and a space where a vocabulary writes its mark for one."""
    control = set(chat.control.values())
    marked = (json.loads(chat.tokenizer_json).get("decoder") or {}).get("type") != "ByteLevel"
    return [b"" if id in control else said.replace(SPACE_MARK, b" ") if marked else said for id, said in enumerate(chat.token_bytes.table)]
