"""Tool calls, read from an answer in the form in which the model's own chat template writes them.

The form is not looked up by a model's name: the template is asked to write a call, and what stands around it is the form. So it works
for Hermes and Qwen (`<tool_call>{...}</tool_call>`), Llama 3 (the JSON alone), Mistral (`[TOOL_CALLS] [{...}]`), and their like.
"""

from __future__ import annotations

import functools
import json
import secrets
import string
from dataclasses import dataclass
from typing import Any

from trainers.chat import Chat, Message
from trainers.errors import TemplateError, UserError

NAME = "probe_of_tools"
USER: Message = {"role": "user", "content": "Hello"}
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}
BLANK = " \t\r\n"


@dataclass(frozen=True)
class Form:
    """How a template writes a call: opening, JSON of the call, closing."""

    opening: str
    marker: str
    """The part of `opening` by which a call is known; "" where a call is nothing but its JSON."""
    end: str
    """What closes a call (or a list of them) behind its JSON, without blanks and brackets."""
    arguments: str
    """The key of a call's arguments."""
    short_ids: bool
    """The template takes ids of 9 letters only."""

    def new_id(self) -> str:
        if self.short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


@functools.lru_cache(maxsize=32)
def form_of(chat: Chat) -> Form | None:
    """The form of this chat's template; None if it does not show tools to the model, or writes calls in no form that we can read."""
    tools = json.dumps([TOOL])
    for id in ("call_0123456789abcdef01234567", "abcdefghi"):
        call = {"name": NAME, "arguments": '{"x": 1}', "id": id}
        called: list[Message] = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        prompt, whole = chat.render_all([([USER], tools, True), (called, tools, False)])
        if isinstance(prompt, TemplateError):
            return None
        if isinstance(whole, TemplateError):
            continue
        if NAME not in prompt or not whole.startswith(prompt):
            return None
        return _form(whole[len(prompt) :], chat, short_ids=len(id) == 9)
    return None


def _form(turn: str, chat: Chat, short_ids: bool) -> Form | None:
    stop = next((m.start() for m in chat.control_pattern.finditer(turn) if m[0] in chat.ends), len(turn))
    at = turn.find(NAME)
    start = turn.rfind("{", 0, max(at, 0))
    if at < 0 or start < 0:
        return None
    try:
        call, length = json.JSONDecoder().raw_decode(turn[start:stop])
    except ValueError:
        return None
    key = next((k for k, v in call.items() if v == {"x": 1}), None)
    if call.get("name") != NAME or key is None:
        return None
    opening, closing = turn[:start].lstrip(BLANK), turn[start + length : stop]
    marker = opening.rstrip(BLANK).removesuffix("[").rstrip(BLANK)
    return Form(opening, marker, closing.strip(BLANK + "]"), key, short_ids)


def needed(chat: Chat, param: str) -> Form:
    """`form_of`, or UserError."""
    if form := form_of(chat):
        return form
    raise UserError(
        "This model's chat template knows no tools, so it would never see them.",
        "Leave the tools out, or call a model that was tuned with a template that has them (`model.template`: chatml, llama3, mistral).",
        param,
    )


def call_schema(form: Form, functions: list[dict[str, Any]]) -> str:
    """The JSON schema of a call of one of these functions, whose arguments follow the function's own schema."""
    calls = []
    for i, function in enumerate(functions):
        place = f"#/anyOf/{i}/properties/{form.arguments}" if len(functions) > 1 else f"#/properties/{form.arguments}"
        parameters = _moved(function.get("parameters") or {"type": "object"}, place)
        properties = {"name": {"const": function["name"]}, form.arguments: parameters}
        calls.append({"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False})
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls}, ensure_ascii=False)


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at `place` of another: what it refers to in itself is found there."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#"):
        moved["$ref"] = place + ref[1:]
    return moved


def opening_ids(chat: Chat, form: Form) -> list[int]:
    """What a prompt ends with so that the answer can only go on with a call's JSON."""
    ids: list[int] = []
    at = 0
    for match in [*chat.control_pattern.finditer(form.opening), None]:
        text = form.opening[at : match.start() if match else None]
        if text:
            ids += chat.encoder.encode(text, "after" if at else "continue")
        if match:
            ids.append(chat.control[match[0]])
            at = match.end()
    return ids


@dataclass(frozen=True)
class Call:
    id: str
    name: str
    arguments: str
    """JSON object as text."""


class Reader:
    """Parts an answer's text, as it comes, into what is said and what is called. What looks like a call and is none is said."""

    def __init__(self, form: Form, names: list[str], opened: bool = False) -> None:
        """`opened`: the prompt ends with the form's opening, so the answer begins inside a call."""
        self.form, self.names = form, names
        self._buffer = ""
        self._state = "call" if opened else "text" if form.marker else "start"
        self._marker = "" if opened else form.marker
        """What the call at hand began with."""
        self._said, self._calls = "", list[Call]()
        self._called = False
        """Nothing was said since the last call."""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """(what is said, what is called) for certain."""
        self._buffer += text
        self._said, self._calls = "", []
        while getattr(self, f"_in_{self._state}")():
            pass
        return self._said, self._calls

    def end(self) -> str:
        """What was held back and is no call."""
        if self._state == "after" or (self._called and not self._buffer.strip(BLANK)):
            return ""
        return (self._marker if self._state == "call" else "") + self._buffer

    # Each looks at the buffer in one state, and says whether to look again in the next.

    def _in_start(self) -> bool:
        """Without a marker, a call is all of the answer or nothing of it."""
        begun = self._buffer.lstrip(BLANK)
        if begun:
            self._state = "call" if begun[0] == "{" else "text"
        return bool(begun)

    def _in_text(self) -> bool:
        marker, text = self.form.marker, self._buffer
        at = text.find(marker) if marker else -1
        if at >= 0:
            self._said += text[:at].rstrip(BLANK)
            self._buffer, self._state, self._marker = text[at + len(marker) :], "call", marker
            return True
        said = text[: len(text) - max((n for n in range(1, len(marker)) if text.endswith(marker[:n])), default=0)]
        if marker:
            said = said.rstrip(BLANK)  # blanks before a call belong to its form
        self._said += said
        self._buffer = text[len(said) :]
        self._called = self._called and not said
        return False

    def _in_call(self) -> bool:
        text, end = self._buffer, self.form.end
        start = len(text) - len(text.lstrip(BLANK + ",["))
        try:
            value, stop = json.JSONDecoder().raw_decode(text, start) if "}" in text else (None, 0)
        except (ValueError, RecursionError):
            value, stop = None, 0
        if call := self._as_call(value):
            self._calls.append(call)
            self._buffer, self._state, self._called = text[stop:], "after", True
            return True
        at = text.find(end) if end else -1
        if at < 0:
            return False
        self._said += self._marker + text[: at + len(end)]  # closed, and no call
        self._buffer, self._state = text[at + len(end) :], "text"
        return True

    def _in_after(self) -> bool:
        end, marker = self.form.end, self.form.marker
        text = self._buffer = self._buffer.lstrip(BLANK + "],")
        if not text or (end and end.startswith(text) and text != end):
            return False
        if end and text.startswith(end):
            self._buffer = text[len(end) :]
            self._state = "text"
        elif text[0] == "{":
            self._state, self._marker = "call", ""
        elif marker and marker.startswith(text) and text != marker:
            return False
        else:
            self._state = "text"
        return True

    def _as_call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
            return None
        if not self.form.marker and name not in self.names:
            return None  # the JSON may be the answer itself
        arguments = value.get(self.form.arguments, value.get("arguments", value.get("parameters", {})))
        if isinstance(arguments, str):  # some models write JSON inside JSON
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return None
        return Call(self.form.new_id(), name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
