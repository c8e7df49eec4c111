"""How single tokens are told on the wire: their text, their bytes, and how likely they were."""

from __future__ import annotations

from typing import Any

from serve.engine import Engine, Likeliest, TokenEvent
from trainers.chat import Chat


class TokenText:
    """What the ids of one model say, control tokens included."""

    def __init__(self, engine: Engine, chat: Chat) -> None:
        self._piece = engine.piece
        self._control = {id: text for text, id in chat.control.items()}

    def bytes(self, id: int) -> bytes:
        control = self._control.get(id)
        return self._piece(id) if control is None else control.encode()

    def text(self, id: int) -> str:
        return self.bytes(id).decode("utf-8", "replace")

    def key(self, id: int) -> str:
        """A text that no other token has, except one that says the same: broken characters as their bytes."""
        said = self.bytes(id)
        try:
            return said.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in said)

    def entry(self, event: TokenEvent) -> dict[str, Any]:
        """One of `logprobs.content` of a chat completion."""
        return self._told(event.id, event.logprob) | {"top_logprobs": [self._told(id, logprob) for id, logprob in event.top]}

    def top(self, likeliest: Likeliest, id: int, logprob: float | None) -> dict[str, float | None]:
        """One of `top_logprobs` of a text completion: text -> log-probability, the token itself among them."""
        told: dict[str, float | None] = {}
        for other, value in (*likeliest, (id, logprob)):
            told.setdefault(self.key(other), value)
        return told

    def _told(self, id: int, logprob: float | None) -> dict[str, Any]:
        said = self.bytes(id)
        return {"token": said.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(said)}
