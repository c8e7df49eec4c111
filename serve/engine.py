"""What an engine does: turn prompt ids into a stream of token events. Plain data, so that engines are exchangeable."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]

Likeliest = tuple[tuple[int, float], ...]
"""(token id, natural log of its probability), likeliest first."""


ANY_OBJECT = '{"type":"object"}'
"""The JSON schema of any JSON object."""


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One sequence to generate."""

    prompt_ids: list[int]
    adapter: str | None = None
    """PEFT folder of the adapter to answer with; None = the bare base."""
    max_tokens: int | None = None
    """Most tokens to generate; None = what fits the context; 0 = only score the prompt, which `prompt_logprobs` must then ask for."""
    temperature: float = 1.0
    """0 = always the likeliest token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this."""
    top_k: int | None = None
    """Sample among this many likeliest tokens; None = all."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time that it was generated, as OpenAI defines it."""
    presence_penalty: float = 0.0
    """Taken from a token's logit if it was generated before."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    json_schema: str | None = None
    """The answer is JSON that fits this JSON schema (JSON text); nothing else can be sampled, and it ends only when it is complete."""
    logprobs: int | None = None
    """Tell the log-probability of each generated token and of this many likeliest ones. It is the model's own: log_softmax of the raw
    logits in fp32, before temperature, penalties, bias and schema. None = nothing; 0 = of the token alone."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, as one PromptEvent before the first TokenEvent."""
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
    logprob: float | None = None
    """Of this token, where the request asks for it."""
    top: Likeliest = ()


@dataclass(frozen=True)
class PromptEvent:
    """How likely the prompt is."""

    logprobs: tuple[float | None, ...]
    """One for each prompt id; None for the first, which nothing stands before."""
    top: tuple[Likeliest, ...]
    """One for each prompt id; empty for the first."""


class Engine(Protocol):
    """One base model and any number of adapters."""

    context: int
    """Most tokens of prompt and answer together."""

    @property
    def num_running(self) -> int:
        """Sequences being generated now."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent | PromptEvent, None]:
        """Stream the answer's tokens; closing the iterator stops the generation.

        Raises, before the first event, UserError if the request cannot fit the context, its schema cannot be compiled or its adapter is
        unusable, and Unavailable if more requests wait than the engine holds.
        """
        ...

    def piece(self, id: int) -> bytes:
        """A token's bytes; empty for a control token and an id beyond the vocabulary."""
        ...

    def evict(self, adapter: str) -> None:
        """Forget an adapter's weights, at the end of the last stream that uses them. Its folder may be gone already."""
        ...

    def stats(self) -> dict[str, Any]:
        """`waiting` and `running` (sequences), `adapters` (number loaded), `adapter_bytes`, `cache_bytes`, and what else it counts."""
        ...

    def close(self) -> None:
        """Stop all work and free the model."""
        ...
