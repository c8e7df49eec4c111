"""What an engine does: turn prompt ids into a stream of token events. Plain data, so that engines are exchangeable."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One sequence to generate."""

    prompt_ids: list[int]
    adapter: str | None = None
    """PEFT folder of the adapter to answer with; None = the bare base."""
    max_tokens: int | None = None
    """Most tokens to generate; None = what fits the context."""
    temperature: float = 1.0
    """0 = always the likeliest token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this."""
    stop_ids: frozenset[int] | None = None
    """Ids that end the answer; None = those of the base's own chat template."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    seed: int | None = None
    """Same seed and same request: same answer. None = a fresh seed."""


@dataclass(frozen=True)
class TokenEvent:
    """One generated token."""

    id: int
    text: str
    """What this token added to the answer: whole characters only; empty while text is held back."""
    finish_reason: FinishReason | None = None
    """Set on the last event of a stream."""


class Engine(Protocol):
    """One base model and any number of adapters."""

    context: int
    """Most tokens of prompt and answer together."""

    @property
    def num_running(self) -> int:
        """Sequences being generated now."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Stream the answer's tokens; closing the iterator stops the generation.

        Raises UserError if the request cannot fit the context or its adapter is unusable, before the first event.
        """
        ...

    def close(self) -> None:
        """Stop all work and free the model."""
        ...
