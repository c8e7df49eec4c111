"""The chat completions wire: what a request may say, and the shapes that answer it.

After openai-python's `types/chat`. A key that we do not know is ignored; one that would change the answer's meaning and is
not supported is refused, so that nobody takes an answer for something that it is not.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainers.errors import TuneyardError, UserError

# Keys that change the meaning of an answer, and the values that leave it as it is.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates know it: text parts joined, `developer` under its older name."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    include_usage: bool | None = None


Stop = Annotated[str, Field(min_length=1)]


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. `null` means the default, as in OpenAI's own service."""

    model_config = ConfigDict(strict=True)

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    n: Annotated[int, Field(ge=1, le=8)] = 1
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body

    @field_validator("seed")
    @classmethod
    def _fit_seed(cls, seed: int | None) -> int | None:
        return seed if seed is None else seed % 2**63

    @property
    def limit(self) -> int | None:
        """Most tokens to generate; None = what fits."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def parse(body: bytes) -> ChatRequest:
    """The request in a body; raises UserError naming the first thing that is wrong."""
    value = parse_object(body)
    for key, plain in UNSUPPORTED.items():
        if value.get(key) is not None and value[key] not in plain:
            raise UserError(f"`{key}` is not supported by this model.", "Leave it out.", key)
    try:
        return ChatRequest.model_validate(value)
    except ValidationError as error:
        raise explained(error) from None


def parse_messages(body: bytes) -> list[dict[str, str]]:
    """The messages of a body that holds nothing else of interest."""

    class Body(BaseModel):
        model_config = ConfigDict(strict=True)
        messages: Annotated[list[ChatMessage], Field(min_length=1)]

    try:
        return [m.plain() for m in Body.model_validate(parse_object(body)).messages]
    except ValidationError as error:
        raise explained(error) from None


def parse_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError("The body is not a JSON object.", "Send one with `model` and `messages`.")
    return value


def explained(error: ValidationError) -> UserError:
    """The first of pydantic's complaints as one line."""
    first = error.errors(include_url=False)[0]
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"] if p not in VARIANTS).lstrip(".")
    shown = json.dumps(first["input"], default=str)
    value = "is missing" if first["type"] == "missing" else f"is {shown if len(shown) <= 80 else shown[:77] + '...'}"
    rule = "" if first["type"] == "missing" else f" {first['msg']}."
    return UserError(f"`{where}` {value}.{rule}", "Correct the request.", where)


VARIANTS = ("str", "constrained-str")  # names that pydantic puts into the location of a value with several allowed types


# -- answers -----------------------------------------------------------------------------------------------------------


def usage(num_prompt: int, num_completion: int) -> dict[str, int]:
    return {"prompt_tokens": num_prompt, "completion_tokens": num_completion, "total_tokens": num_prompt + num_completion}


def completion(id: str, created: int, model: str, answers: list[tuple[str, str]], counts: dict[str, int]) -> dict[str, Any]:
    """A whole answer; `answers` are (text, finish reason)."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        for i, (text, reason) in enumerate(answers)
    ]
    return {"id": id, "object": "chat.completion", "created": created, "model": model, "choices": choices, "usage": counts}


def chunk(id: str, created: int, model: str, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    """A piece of a streamed answer."""
    choices = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}]
    return {"id": id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices}


def error_body(error: TuneyardError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}
