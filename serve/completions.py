"""/v1/completions, the older wire: texts or token ids go on as they are, without a chat template.

Its main callers score text: `echo` with `logprobs` and `max_tokens: 0` (or 1, lm-evaluation-harness) tells how likely a prompt is.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import Field

from serve.engine import Engine, GenerateRequest, Likeliest, PromptEvent, TokenEvent
from serve.protocol import MAX_TOP, Sampling, read, usage
from serve.streams import merged
from serve.tokentext import TokenText
from trainers.chat import Chat
from trainers.errors import DataError, UserError

MAX_SEQUENCES = 128
"""Prompts times `n` in one request."""

Id = Annotated[int, Field(ge=0)]


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[Id] | list[list[Id]]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool = False
    best_of: int | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]  # all of them are, then
        return self.prompt  # type: ignore[return-value]


def parse(body: bytes) -> CompletionRequest:
    """The request in a body; raises UserError naming the first thing that is wrong."""
    asked = read(CompletionRequest, body)
    if not asked.prompts:
        raise UserError("`prompt` is empty.", "Send at least one prompt.", "prompt")
    if (count := len(asked.prompts) * asked.n) > MAX_SEQUENCES:
        raise UserError(
            f"`prompt` asks for {count:,} answers (prompts times `n`); the most is {MAX_SEQUENCES}.", "Send fewer at a time.", "prompt"
        )
    if asked.best_of is not None and asked.best_of != asked.n:
        raise UserError("`best_of` is not supported.", "Leave it out, or ask for `n` answers and choose.", "best_of")
    if asked.max_tokens == 0 and not asked.echo:
        raise UserError("`max_tokens` is 0 and `echo` is not set: there is nothing to answer.", "Send `echo: true` with it.", "max_tokens")
    return asked


def prompt_ids(chat: Chat, prompt: str | list[int], index: int, most: int) -> list[int]:
    """Ids of a prompt, at most so many. A text is read as training reads a row of plain text; nothing in it acts as a control token."""
    if isinstance(prompt, str):
        try:
            ids = chat.text_prompt(prompt)
        except DataError as error:
            raise UserError(f"`prompt` {index}: {error.message}", "Send token ids where control tokens are meant.", "prompt") from None
    else:
        ids = prompt
        size = chat.tokenizer.get_vocab_size()
        if beyond := next((id for id in ids if id >= size), None):
            raise UserError(f"`prompt` {index} has the token id {beyond}; this model has {size:,} tokens.", "Use its tokenizer.", "prompt")
    if not ids:
        raise UserError(f"`prompt` {index} is empty.", "Send some text.", "prompt")
    if len(ids) > most:
        raise UserError(f"`prompt` {index} has {len(ids)} tokens; this model's context leaves room for {most}.", "Shorten it.", "prompt")
    return ids


class _Answer:
    """One sequence so far."""

    def __init__(self, tokens: TokenText, prompt: list[int], asked: CompletionRequest) -> None:
        self.tokens, self.prompt, self.asked = tokens, prompt, asked
        self.end = 0
        """Characters so far, by the tokens' bytes."""

    def prompt_part(self, event: PromptEvent) -> tuple[str, dict[str, Any] | None]:
        """The echoed prompt: (text, logprobs)."""
        text = b"".join(map(self.tokens.bytes, self.prompt)).decode("utf-8", "replace")
        return text, self._logprobs(self.prompt, event.logprobs, event.top, first=True)

    def part(self, event: TokenEvent) -> tuple[str, dict[str, Any] | None]:
        return event.text, self._logprobs([event.id], [event.logprob], [event.top])

    def _logprobs(
        self, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[Likeliest], first: bool = False
    ) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        told: dict[str, Any] = {"tokens": [], "token_logprobs": list(logprobs), "top_logprobs": [], "text_offset": []}
        for n, (id, logprob, top) in enumerate(zip(ids, logprobs, tops, strict=True)):
            told["tokens"].append(self.tokens.key(id))
            told["top_logprobs"].append(None if first and n == 0 else self.tokens.top(top, id, logprob))
            told["text_offset"].append(self.end)
            self.end += len(self.tokens.text(id))
        return told


class Completion:
    """The answers to all prompts of a request; choice `i * n + j` is answer j to prompt i."""

    def __init__(
        self, asked: CompletionRequest, engine: Engine, chat: Chat, prompts: list[list[int]], model: str, adapter: str | None
    ) -> None:
        self.asked, self.engine = asked, engine
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()), "model": model}
        self.num_prompt = sum(map(len, prompts))
        tokens, vocabulary = TokenText(engine, chat), chat.tokenizer.get_vocab_size()
        self.answers = [_Answer(tokens, ids, asked) for ids in prompts for _ in range(asked.n)]
        self.requests = [
            GenerateRequest(
                prompt_ids=ids,
                adapter=adapter,
                stop_ids=frozenset() if asked.ignore_eos else chat.stop_ids,
                max_tokens=asked.max_tokens,
                logprobs=asked.logprobs,
                prompt_logprobs=(asked.logprobs or 0) if asked.echo else None,
                **asked.sampling(choice, vocabulary),
            )
            for ids in prompts
            for choice in range(asked.n)
        ]

    async def whole(self) -> dict[str, Any]:
        texts = [""] * len(self.answers)
        logprobs: list[dict[str, Any] | None] = [None] * len(self.answers)
        reasons = ["length"] * len(self.answers)
        num_tokens = 0
        async with aclosing(self._parts()) as parts:
            async for index, text, told, reason, is_token in parts:
                num_tokens += is_token
                texts[index] += text
                reasons[index] = reason or reasons[index]
                if told and (before := logprobs[index]):
                    for key, values in told.items():
                        before[key] += values
                else:
                    logprobs[index] = told or logprobs[index]
        choices = [
            {"index": i, "text": text, "logprobs": told, "finish_reason": reason}
            for i, (text, told, reason) in enumerate(zip(texts, logprobs, reasons, strict=True))
        ]
        return {**self.head, "choices": choices, "usage": usage(self.num_prompt, num_tokens)}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        with_usage = self.asked.stream_options.include_usage
        extra = {"usage": None} if with_usage else {}
        num_tokens = 0
        async with aclosing(self._parts()) as parts:
            async for index, text, told, reason, is_token in parts:
                num_tokens += is_token
                if text or told or reason:
                    choice = {"index": index, "text": text, "logprobs": told, "finish_reason": reason}
                    yield {**self.head, "choices": [choice], **extra}
        if with_usage:
            yield {**self.head, "choices": [], "usage": usage(self.num_prompt, num_tokens)}

    async def _parts(self) -> AsyncGenerator[tuple[int, str, dict[str, Any] | None, str | None, bool], None]:
        """(choice, text, logprobs, finish reason, whether it is a generated token)."""
        async with aclosing(merged(self.engine, self.requests)) as events:
            async for index, event in events:
                answer = self.answers[index]
                if isinstance(event, PromptEvent):
                    yield index, *answer.prompt_part(event), None if self.asked.max_tokens else "length", False
                else:
                    yield index, *answer.part(event), event.finish_reason, True
