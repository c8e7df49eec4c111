"""The body of POST /v1/chat/completions: messages, tools, and the form that an answer must have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator

from serve.engine import ANY_OBJECT
from serve.protocol import MAX_TOP, Sampling, check_schema, read
from trainers.chat import Message
from trainers.errors import UserError


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def plain(self, where: str) -> Message:
        """As trainers.chat knows it: text parts joined, `developer` under its older name. `where` names it in errors."""
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            rule = "Only an assistant's message with `tool_calls` may leave it out."
            raise UserError(f"`{where}.content` is missing.", rule, f"{where}.content")
        text = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        message: Message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None and self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        if self.role != "assistant":
            if self.tool_calls:
                raise UserError(f"`{where}.tool_calls`: only the assistant calls tools.", "Remove them.", f"{where}.tool_calls")
            return message
        if self.reasoning_content:
            message["reasoning"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(self.tool_calls)]
        return message


def _call(call: ToolCall, where: str) -> dict[str, str]:
    try:
        arguments = orjson.loads(call.function.arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        param = f"{where}.function.arguments"
        raise UserError(f"`{param}` is no JSON object.", 'Send it as text, "{}" if there are none.', param)
    named = {"name": call.function.name, "arguments": call.function.arguments or "{}"}
    return named | ({"id": call.id} if call.id is not None else {})


class Function(BaseModel):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: Function


def _as_it_is(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Checked, and then passed on just as it came: templates write tools out, as training saw them."""
    check(value)
    return value


class NamedFunction(BaseModel):
    name: str


class ToolChoice(BaseModel):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    of: dict[str, Any] = Field(default={}, alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class WithMessages(BaseModel):
    """A body that shows the model messages and tools."""

    model_config = ConfigDict(strict=True)

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: Annotated[list[Annotated[Tool, WrapValidator(_as_it_is)]], Field(max_length=128)] = []

    def plain(self) -> list[Message]:
        return [message.plain(f"messages[{i}]") for i, message in enumerate(self.messages)]

    @property
    def tools_text(self) -> str | None:
        """As trainers.chat takes them."""
        return orjson.dumps(self.tools).decode() if self.tools else None


class ChatRequest(Sampling, WithMessages):
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] = 0
    response_format: ResponseFormat = ResponseFormat(type="text")
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @property
    def limit(self) -> int | None:
        """Most tokens to generate; None = what fits."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def tool_names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]  # type: ignore[index]  # they are kept as they came

    @property
    def forced(self) -> list[dict[str, Any]]:
        """The functions of which one must be called; empty where the model may choose not to."""
        functions: list[dict[str, Any]] = [tool["function"] for tool in self.tools]  # type: ignore[index]
        if isinstance(self.tool_choice, ToolChoice):
            return [f for f in functions if f["name"] == self.tool_choice.function.name]
        return functions if self.tool_choice == "required" else []

    @property
    def answer_schema(self) -> str | None:
        """The JSON schema that `response_format` asks for."""
        if self.response_format.type == "json_object":
            return ANY_OBJECT
        if self.response_format.type == "json_schema":
            assert self.response_format.json_schema is not None  # `parse` looked
            return orjson.dumps(self.response_format.json_schema.of).decode()
        return None


def parse(body: bytes) -> ChatRequest:
    """The request in a body; raises UserError naming the first thing that is wrong."""
    asked = read(ChatRequest, body)
    if asked.top_logprobs and not asked.logprobs:
        raise UserError("`top_logprobs` needs `logprobs`.", "Send `logprobs: true` with it.", "top_logprobs")
    _check_tools(asked)
    form = asked.response_format
    if form.type == "json_schema":
        if form.json_schema is None:
            raise UserError("`response_format.json_schema` is missing.", "Give it a name and a schema.", "response_format.json_schema")
        check_schema(form.json_schema.of, "response_format.json_schema.schema")
    if form.type != "text" and asked.tools and asked.tool_choice != "none":
        raise UserError(
            "`response_format` and `tools` cannot go together: an answer of that form could call no tool.",
            "Leave one out, or send `tool_choice: none`.",
            "response_format",
        )
    return asked


def parse_messages(body: bytes) -> WithMessages:
    """The messages and tools of a body that holds nothing else of interest."""
    return read(WithMessages, body)


def _check_tools(asked: ChatRequest) -> None:
    names = asked.tool_names
    for i, tool in enumerate(asked.tools):
        function: dict[str, Any] = tool["function"]  # type: ignore[index]
        if function.get("parameters") is not None:
            check_schema(function["parameters"], f"tools[{i}].function.parameters")
        if names.index(function["name"]) != i:
            param = f"tools[{i}].function.name"
            raise UserError(f"`{param}` is `{function['name']}`, as another tool's is.", "Give each its own name.", param)
    if asked.tool_choice == "required" and not asked.tools:
        raise UserError("`tool_choice` is `required`, and there are no tools.", "Send `tools`.", "tool_choice")
    if isinstance(asked.tool_choice, ToolChoice) and asked.tool_choice.function.name not in names:
        known = ", ".join(names) or "none"
        raise UserError(
            f"`tool_choice` names `{asked.tool_choice.function.name}`, which is no tool of this request.",
            f"There are: {known}.",
            "tool_choice",
        )
