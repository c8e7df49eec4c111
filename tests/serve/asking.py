"""How tests speak to the `served` app: the unmodified openai client, with the headers that the gateway would send."""

from __future__ import annotations

import functools
from typing import Any

import openai

MESSAGES: list[Any] = [{"role": "user", "content": "the quick brown fox"}]


def client(served: Any, adapter: str = "", timeout: float = 120) -> openai.OpenAI:
    return _client(served.url, served.token, adapter, timeout)


@functools.cache  # one for each, so that connections are used again
def _client(url: str, token: str, adapter: str, timeout: float) -> openai.OpenAI:
    headers = {"x-tuneyard-model": "ft:tiny", "x-tuneyard-adapter": adapter}
    return openai.OpenAI(base_url=f"{url}/v1", api_key=token, default_headers=headers, max_retries=0, timeout=timeout)


def ask(served: Any, adapter: str = "", **body: Any) -> Any:
    asked = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, **body}
    return client(served, adapter).chat.completions.create(model="any", **asked)


def complete(served: Any, prompt: Any, **body: Any) -> Any:
    return client(served).completions.create(model="any", prompt=prompt, **{"temperature": 0, "max_tokens": 8, **body})
