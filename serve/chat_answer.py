"""A chat completion in the making: from the engine's events to the wire, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from serve.chat_request import ChatRequest
from serve.engine import Engine, GenerateRequest, TokenEvent
from serve.protocol import usage
from serve.streams import merged
from serve.tokentext import TokenText
from serve.tools import Call, Form, Reader, call_schema, opening_ids
from trainers.chat import Chat

Chunk = tuple[dict[str, Any], dict[str, Any] | None, str | None]
"""(delta, logprobs, finish reason)."""


class Choice:
    """One of the `n` answers: turns events into deltas."""

    def __init__(
        self, reader: Reader | None, marks: dict[int, str], tokens: TokenText | None, stop_ids: frozenset[int], many: bool
    ) -> None:
        """`marks`: control tokens that are part of a call's form; the engine leaves them out of the text. `tokens`: tell
        log-probabilities. `many`: further calls after the first one count."""
        self._reader, self._marks, self._tokens, self._stop_ids, self._many = reader, marks, tokens, stop_ids, many
        self._entries: list[dict[str, Any]] = []
        self._num_calls = 0

    def take(self, event: TokenEvent) -> list[Chunk]:
        """The chunks that follow from an event."""
        if self._tokens and event.id not in self._stop_ids:
            self._entries.append(self._tokens.entry(event))
        text, calls = event.text, list[Call]()
        if self._reader:
            text, calls = self._reader.push(event.text + self._marks.get(event.id, ""))
            if event.finish_reason:
                text += self._reader.end()
            calls = calls if self._many else calls[: max(0, 1 - self._num_calls)]
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        for call in calls:
            function = {"name": call.name, "arguments": call.arguments}
            deltas.append({"tool_calls": [{"index": self._num_calls, "id": call.id, "type": "function", "function": function}]})
            self._num_calls += 1
        told: list[Chunk] = [(delta, self._logprobs(), None) for delta in deltas]
        if event.finish_reason:
            reason = "tool_calls" if self._num_calls and event.finish_reason == "stop" else event.finish_reason
            told.append(({}, self._logprobs(), reason))
        return told

    def _logprobs(self) -> dict[str, Any] | None:
        """Of the tokens since the last chunk."""
        if self._tokens is None:
            return None
        entries, self._entries = self._entries, []
        return {"content": entries, "refusal": None}


class ChatAnswer:
    """`n` sequences from one prompt."""

    def __init__(
        self, asked: ChatRequest, engine: Engine, chat: Chat, prompt_ids: list[int], form: Form | None, model: str, adapter: str | None
    ) -> None:
        """`form`: how the model's template writes calls, where the request has tools."""
        self.asked, self.engine = asked, engine
        self.head = (f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model)
        forced = asked.forced if form else []
        if form and forced:
            prompt_ids = prompt_ids + opening_ids(chat, form)
        self.num_prompt = len(prompt_ids)
        stop_ids = frozenset[int]() if asked.ignore_eos else chat.stop_ids
        vocabulary = chat.tokenizer.get_vocab_size()
        self.requests = [
            GenerateRequest(
                prompt_ids=prompt_ids,
                adapter=adapter,
                stop_ids=stop_ids,
                max_tokens=asked.limit,
                logprobs=asked.top_logprobs if asked.logprobs else None,
                json_schema=call_schema(form, forced) if form and forced else asked.answer_schema,
                **asked.sampling(i, vocabulary),
            )
            for i in range(asked.n)
        ]
        tokens = TokenText(engine, chat) if asked.logprobs else None
        marks = {id: text for text, id in chat.control.items() if form and (text in form.opening or text in form.end)}
        self.choices = [
            Choice(
                Reader(form, asked.tool_names, opened=bool(forced)) if form else None, marks, tokens, stop_ids, asked.parallel_tool_calls
            )
            for _ in self.requests
        ]

    async def whole(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [{"role": "assistant", "content": "", "refusal": None} for _ in self.choices]
        logprobs: list[dict[str, Any] | None] = [{"content": [], "refusal": None} if self.asked.logprobs else None for _ in self.choices]
        reasons, num_tokens = [""] * len(self.choices), 0
        async with aclosing(merged(self.engine, self.requests)) as events:
            async for index, event in events:
                if not isinstance(event, TokenEvent):
                    continue
                num_tokens += 1
                for delta, told, reason in self.choices[index].take(event):
                    messages[index]["content"] += delta.get("content", "")
                    for call in delta.get("tool_calls", ()):
                        messages[index].setdefault("tool_calls", []).append({k: v for k, v in call.items() if k != "index"})
                    if told:
                        logprobs[index]["content"] += told["content"]  # type: ignore[index]  # it is there where logprobs are asked for
                    reasons[index] = reason or ""
        choices = []
        for i, (message, told, reason) in enumerate(zip(messages, logprobs, reasons, strict=True)):
            if "tool_calls" in message:
                message["content"] = message["content"] or None
            choices.append({"index": i, "message": message, "logprobs": told, "finish_reason": reason})
        id, created, model = self.head
        counts = usage(self.num_prompt, num_tokens)
        return {"id": id, "object": "chat.completion", "created": created, "model": model, "choices": choices, "usage": counts}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        num_tokens = 0
        with_usage = self.asked.stream_options.include_usage
        begun: set[int] = set()

        def chunk(choices: list[dict[str, Any]], counts: dict[str, int] | None = None) -> dict[str, Any]:
            id, created, model = self.head
            value = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices}
            return value | ({"usage": counts} if with_usage else {})

        async with aclosing(merged(self.engine, self.requests)) as events:
            async for index, event in events:
                if not isinstance(event, TokenEvent):
                    continue
                num_tokens += 1
                if index not in begun:
                    begun.add(index)
                    delta = {"role": "assistant", "content": "", "refusal": None}
                    yield chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
                for delta, logprobs, reason in self.choices[index].take(event):
                    yield chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])
        if with_usage:
            yield chunk([], usage(self.num_prompt, num_tokens))
