"""What the bodies of both completion endpoints have in common, and OpenAI's error object.

After openai-python's types. A key that we do not know is ignored; one that would change the answer's meaning and is not supported is
refused, so that nobody takes an answer for something that it is not.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import jsonschema
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trainers.errors import TuneyardError, UserError

# Keys that change the meaning of an answer, and the values that leave it as it is.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "suffix": ("",),
    # Of other servers that speak this wire.
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
}
INSTEAD = {"functions": "Send them as `tools`.", "function_call": "Send `tools` and `tool_choice`."}

MAX_TOP = 20
"""Most likeliest tokens that are told beside each token."""
MAX_STOPS = 16


class StreamOptions(BaseModel):
    include_usage: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100)]
B = TypeVar("B", bound=BaseModel)


class Sampling(BaseModel):
    """What both endpoints take. `null` means the default, as in OpenAI's own service."""

    model_config = ConfigDict(strict=True)

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    """Other servers' addition; 0 and -1 = all."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias], Field(max_length=1024)] = {}
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = []
    n: Annotated[int, Field(ge=1, le=8)] = 1
    seed: int | None = None
    ignore_eos: bool = False
    """Other servers' addition, which load generators ask for: the answer goes on to its limit."""
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
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, choice: int, vocabulary: int) -> dict[str, Any]:
        """The fields of the GenerateRequest of choice `choice` that say how to sample. Raises UserError for ids beyond the vocabulary."""
        bias = {int(id): value for id, value in self.logit_bias.items()}
        if beyond := [id for id in bias if id >= vocabulary]:
            raise UserError(
                f"`logit_bias` names the token {beyond[0]}, and this model has {vocabulary:,}.", "Name the model's own ids.", "logit_bias"
            )
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k if self.top_k > 0 else None,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": bias,
            "stop": self.stops,
            "seed": None if self.seed is None else (self.seed + choice) % 2**63,
        }


def read(kind: type[B], body: bytes) -> B:
    """The request in a body; raises UserError naming the first thing that is wrong."""
    value = parse_object(body)
    for key, plain in UNSUPPORTED.items():
        if value.get(key) is not None and value[key] not in plain:
            raise UserError(f"`{key}` is not supported by this model.", INSTEAD.get(key, "Leave it out."), key)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise explained(error) from None


def parse_object(body: bytes) -> dict[str, Any]:
    """A body as JSON (which has no NaN and no infinity)."""
    try:
        value = orjson.loads(body)
    except ValueError as error:
        raise UserError(f"The body is not JSON: {error}.", "Send a JSON object; JSON has no NaN and no Infinity.") from None
    if not isinstance(value, dict):
        raise UserError("The body is not a JSON object.", "Send one.")
    return value


def explained(error: ValidationError) -> UserError:
    """The first of pydantic's complaints as one line. Of several allowed types, the one that got further tells what is wrong."""
    errors = error.errors(include_url=False)
    first = errors[0]
    if is_variant(first["loc"][-1]):
        union = first["loc"][:-1]
        tried = (found for found in errors if found["loc"][: len(union)] == union)
        other = ("_type", "literal_error")  # this was not even meant
        first = next((found for found in tried if len(found["loc"]) > len(union) + 1 or not found["type"].endswith(other)), first)
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"] if not is_variant(p)).lstrip(".")
    shown = repr(first["input"])
    value = "is missing" if first["type"] == "missing" else f"is {shown if len(shown) <= 80 else shown[:77] + '...'}"
    rule = "" if first["type"] == "missing" else f" {first['msg']}."
    return UserError(f"`{where}` {value}.{rule}", "Correct the request.", where)


def is_variant(part: int | str) -> bool:
    """Whether pydantic put this into a location only to say which of several allowed types it tried."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "constrained-str", "constrained-int", "ToolChoice"))


def check_schema(schema: Any, param: str) -> None:
    """Raise UserError unless it is a JSON schema."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        at = f" at `{error.json_path}`" if error.path else ""
        raise UserError(f"`{param}` is no JSON schema{at}: {error.message[:200]}.", "Mend the schema.", param) from None
    except RecursionError:
        raise UserError(f"`{param}` is nested too deep.", "Make the schema flatter.", param) from None


def usage(num_prompt: int, num_completion: int) -> dict[str, int]:
    return {"prompt_tokens": num_prompt, "completion_tokens": num_completion, "total_tokens": num_prompt + num_completion}


def error_body(error: TuneyardError) -> dict[str, Any]:
    """OpenAI's error object; `remedy` repeats the end of the message, as the gateway's do."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code, "remedy": error.remedy}}
