"""Rows -> conversations, for every layout that we know. Pure: where rows come from is the business of others.

    messages           {"messages": [{"role", "content"[, "weight", "name", "tool_calls", "reasoning_content"]}, ...][, "tools"]}
    sharegpt           {"conversations": [{"from", "value"}, ...][, "system", "tools"]}
    alpaca             {"instruction", "output"[, "input", "system", "history": [[user, assistant], ...]]}
    prompt_completion  {"prompt", "completion"}, both text or lists of messages; of a list, only the completion is trained
    bedrock            {"schemaVersion": "bedrock-conversation-2024", "system": [{"text"}], "messages": [{"role", "content": [{"text"}]}]}
    text               {"text"}: trained whole, as it stands

A conversation is {"messages": [...], "tools": JSON list as text or None}. A message is {"role": system | user | assistant |
tool, "content": str} and, where it has them, "name", a tool's "tool_call_id", an assistant's "weight" (0: context only),
"reasoning" and "tool_calls" ([{"name", "arguments": JSON object as text[, "id"]}]). Tools and arguments are text from here
on, because tables fill keys that a struct lacks with nulls. Rows may have other columns; they are ignored.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import orjson

Row = dict[str, Any]
Message = dict[str, Any]
Conversation = dict[str, Any]

NORMALISER_VERSION = 2  # raise it whenever any row normalises differently: it is part of every token store's key

REQUIRED = {
    "bedrock": ("schemaVersion", "messages"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Format -> the keys that a row must have; `detect` tries them in this order."""
_OPTIONAL = {
    "bedrock": ("system", "toolConfig"),
    "messages": ("tools", "functions", "system"),
    "sharegpt": ("tools", "functions", "system"),
    "alpaca": ("input", "system", "history", "tools"),
    "prompt_completion": ("system", "tools"),
    "text": (),
}
_IN_TURNS = ("role", "content", "from", "value", "weight")
"""Names in a column map that stand for keys of every message."""
_MEDIA = frozenset({"images", "videos", "audios"})

SHAPES = {
    "bedrock": '{"schemaVersion": "bedrock-conversation-2024", "messages": [{"role": "user", "content": [{"text": "..."}]}, ...]}',
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
    "prompt_completion": '{"prompt": "...", "completion": "..."}',
    "text": '{"text": "..."}',
}
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_COMMON = {"human": "user", "gpt": "assistant", "system": "system"}
_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


class Bad(Exception):
    """Why a row is no conversation: `what` follows the row's place, `kind` is the reason without the row's own values."""

    def __init__(self, what: str, remedy: str, kind: str = "") -> None:
        super().__init__(what, remedy, kind)
        self.what = what
        self.remedy = remedy
        self.kind = kind or what


# -- formats and columns ---------------------------------------------------------------------------------------------------


def detect(keys: Iterable[str]) -> str | None:
    """The format of a row with these keys."""
    keys = set(keys)
    return next((format for format, required in REQUIRED.items() if keys.issuperset(required)), None)


def columns_of(format: str) -> tuple[str, ...]:
    """Every column that a format looks at."""
    return (*REQUIRED[format], *_OPTIONAL[format], *_MEDIA)


def check_columns(columns: dict[str, str], format: str) -> None:
    """Raise Bad for a column map with a name on its left side that the format does not know."""
    known = (*REQUIRED[format], *_OPTIONAL[format], *_IN_TURNS)
    for name in columns:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"It has {', '.join(known)}."
            raise Bad(f"cannot map `{name}`: the {format} format has no such column", hint)


def mapped_keys(columns: dict[str, str]) -> set[str]:
    """The columns of a row that a map makes (its other names stand for keys of every message)."""
    return {name for name in columns if name not in _IN_TURNS}


def look_up(row: Row, path: str) -> Any:
    """The value of a column, or of `outer.inner` inside it; None where there is none."""
    if path in row or "." not in path:
        return row.get(path)
    outer, inner = path.split(".", 1)
    value = row.get(outer)
    return look_up(value, inner) if isinstance(value, dict) else None


def rename(row: Row, columns: dict[str, str]) -> Row:
    """The row under the format's names (`columns`: the format's name -> the data's name)."""
    taken = set(columns.values())
    renamed = {key: value for key, value in row.items() if key not in taken}
    in_turns = {}
    for name, path in columns.items():
        if name in _IN_TURNS:
            in_turns[path] = name
        elif (value := look_up(row, path)) is not None:
            renamed[name] = value
    if in_turns:
        for key in ("messages", "conversations"):
            if isinstance(turns := _unpacked(renamed.get(key)), list):
                renamed[key] = [{in_turns.get(k, k): v for k, v in t.items()} if isinstance(t, dict) else t for t in turns]
    return renamed


def suggest(keys: Iterable[str]) -> str:
    """The column map to write for a row with these keys."""
    keys = list(keys)
    for format in ("messages", "sharegpt", "alpaca"):
        pairs = [(name, _like(name, keys)) for name in REQUIRED[format]]
        if all(found for _, found in pairs) and len({found for _, found in pairs}) == len(pairs):
            return (
                "Write `columns: {" + ", ".join(f"{name}: {found}" for name, found in pairs) + "}` beside `path` if that is what they hold."
            )
    return "Write `columns: {instruction: <its question>, output: <its answer>}` beside `path`, or rows like " + SHAPES["messages"] + "."


_SYNONYMS = {
    "messages": ("dialog", "dialogue", "conversation", "chat", "turns", "message"),
    "instruction": ("question", "query", "prompt", "problem", "user", "request", "input", "text", "source"),
    "output": ("answer", "response", "completion", "solution", "assistant", "reply", "chosen", "target", "label"),
}


def _like(name: str, keys: list[str]) -> str | None:
    by_lower = {key.lower(): key for key in keys}
    exact = next((by_lower[word] for word in (name, *_SYNONYMS.get(name, ())) if word in by_lower), None)
    near = difflib.get_close_matches(name, by_lower, n=1, cutoff=0.8)
    return exact or (by_lower[near[0]] if near else None)


# -- rows to conversations -------------------------------------------------------------------------------------------------


def normalise(row: Row, format: str) -> Conversation:
    """A row as {"messages", "tools"} (and "text": True where it is text to train as it stands); raises Bad."""
    if not _MEDIA.isdisjoint(row):
        for key in _MEDIA:
            if row.get(key):
                raise Bad(f"has `{key}`, which cannot be trained", "Remove the row: without them its text would mean something else.")
    if format == "text":
        return {"messages": [_answer(_text(row["text"], "`text`"), "`text`")], "tools": None, "text": True}
    messages = _PARSERS[format](row)
    if messages[0]["role"] == "assistant":
        raise Bad("begins with an assistant turn, which answers nothing", "Begin with a system or user message.")
    for message in messages:
        if message["role"] == "assistant":
            break
    else:
        raise Bad("has no assistant turn, so nothing can be learnt from it", "Add an assistant message, or remove the row.")
    return {"messages": messages, "tools": _tools(row, format)}


def _from_messages(row: Row, key: str = "messages") -> list[Message]:
    turns = row[key]
    if type(turns) is str:
        turns = _unpacked(turns)
    if not isinstance(turns, list) or not turns:
        kind = "an empty list" if turns == [] else f"a {kind_of(turns)}"
        raise Bad(f"has {kind} as `{key}`", "Give it a list of messages.", f"has no list of messages as `{key}`")
    messages: list[Message] = _system(row) if "system" in row else []
    for n, turn in enumerate(turns, 1):
        if type(turn) is dict and len(turn) == 2:  # the common cases, without a look at keys that are not there
            role, content = turn.get("role"), turn.get("content")
            if role is None and content is None:
                role, content = turn.get("from"), turn.get("value")
                role = _COMMON.get(role) if type(role) is str else None
            if type(content) is str and (
                role == "user"
                or role == "system"
                or (role == "assistant" and content and not content.isspace() and "<think>" not in content)
            ):
                messages.append({"role": role, "content": content})
                continue
        messages.append(_message(turn, n))
    return messages


def _from_sharegpt(row: Row) -> list[Message]:
    return _from_messages(row, "conversations")


def _from_alpaca(row: Row) -> list[Message]:
    messages: list[Message] = _system(row) if "system" in row else []
    if history := row.get("history"):
        history = _unpacked(history)
        if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise Bad("has a `history` that is not a list of [user, assistant] pairs", 'Write it as [["question", "answer"], ...].')
        for user, answer in history:
            messages += [{"role": "user", "content": _text(user, "`history`")}, _answer(_text(answer, "`history`"), "`history`")]
    user = row["instruction"]
    if type(user) is not str:
        _text(user, "`instruction`")
    if context := row.get("input"):
        if type(context) is not str:
            _text(context, "`input`")
        if not context.isspace():
            user = f"{user}\n\n{context}" if user and not user.isspace() else context
    if not user or user.isspace():
        raise Bad("has an empty `instruction`", "Fill it in, or remove the row.")
    messages.append({"role": "user", "content": user})
    messages.append(_answer(_text(row["output"], "`output`"), "`output`"))
    return messages


def _from_prompt_completion(row: Row) -> list[Message]:
    messages: list[Message] = _system(row) if "system" in row else []
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        turns = _from_messages({"messages": prompt})
        messages += [{**m, "weight": 0} if m["role"] == "assistant" else m for m in turns]  # context, whoever said it
    else:
        messages.append({"role": "user", "content": _text(prompt, "`prompt`")})
    if isinstance(completion, list):
        return messages + _from_messages({"messages": completion})
    return [*messages, _answer(_text(completion, "`completion`"), "`completion`")]


def _from_bedrock(row: Row) -> list[Message]:
    if row["schemaVersion"] != "bedrock-conversation-2024":
        _refuse("has an unknown schemaVersion", row["schemaVersion"], "It must be bedrock-conversation-2024.")
    messages: list[Message] = []
    if system := row.get("system"):
        messages.append(
            {"role": "system", "content": "".join(_bedrock_text(block, "`system`") for block in _list(_unpacked(system), "`system`"))}
        )
    for n, turn in enumerate(_list(_unpacked(row["messages"]), "`messages`"), 1):
        what = f"message {n}"
        if not isinstance(turn, dict) or turn.get("role") not in ("user", "assistant"):
            raise Bad(f"has no role `user` or `assistant` in {what}", f"Write rows like {SHAPES['bedrock']}.", "has an unknown role")
        texts, thoughts, calls, results = [], [], [], []
        for block in _list(turn.get("content"), what):
            block = _dict(block, what)
            if "toolUse" in block:
                use = _dict(block["toolUse"], what)
                calls.append(_call({"id": use.get("toolUseId"), "name": use.get("name"), "arguments": use.get("input")}, what))
            elif "toolResult" in block:
                results.append(_bedrock_result(_dict(block["toolResult"], what), what))
            elif "reasoningContent" in block:
                thoughts.append(_text(look_up(block, "reasoningContent.reasoningText.text"), f"the reasoning of {what}"))
            elif "cachePoint" not in block:
                texts.append(_bedrock_text(block, what))
        if turn["role"] == "assistant":
            messages.append(_answer("".join(texts), what, "".join(thoughts), calls))
            continue
        messages += results
        if texts or not results:
            messages.append({"role": "user", "content": "".join(texts)})
    return messages


def _bedrock_text(block: Any, what: str) -> str:
    block = _dict(block, what)
    if "text" not in block:
        _refuse(
            f"has a content block without text in {what}:",
            next(iter(block), None),
            "Only text can be trained; remove the row.",
            "has a content block without text",
        )
    return _text(block["text"], what)


def _bedrock_result(result: Row, what: str) -> Message:
    blocks = [_dict(block, what) for block in _list(result.get("content"), what)]
    texts = [_dump(block["json"]) if "json" in block else _bedrock_text(block, what) for block in blocks]
    return {"role": "tool", "content": "".join(texts), **_named(result, "tool_call_id", "toolUseId", what)}


_PARSERS: dict[str, Callable[[Row], list[Message]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "bedrock": _from_bedrock,
}


# -- messages ----------------------------------------------------------------------------------------------------------------


def _message(turn: Any, n: int) -> Message:
    """One turn of a conversation, as role/content or from/value."""
    what = f"message {n}"
    if not isinstance(turn, dict):
        raise Bad(f"has a {kind_of(turn)} as {what}", 'Write it as {"role": ..., "content": ...}.', "has a message that is no object")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    if role_key not in turn:
        raise Bad(f"has no `role` in {what}", 'Write it as {"role": ..., "content": ...}.', "has a message without role")
    named = turn[role_key]
    role = _ROLES.get(named) or _ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        known = "human, gpt, system, function_call or observation" if role_key == "from" else "system, user, assistant or tool"
        shown = json.dumps(named, ensure_ascii=False, default=str)[:80]
        raise Bad(f"has the unknown role {shown} in {what}", f"Use {known}.", "has an unknown role")
    name = _named(turn, "name", "name", what)
    weight = turn.get("weight")
    if role not in ("assistant", "call"):
        if weight is not None:
            raise Bad(
                f"has a weight in {what}, which is no assistant message",
                "Only assistant messages are trained; remove the weight.",
                "has a weight on a message that is no assistant's",
            )
        if turn.get("tool_calls") or turn.get("function_call"):
            raise Bad(
                f"has a tool call in {what}, which is no assistant message", "Only the assistant calls tools.", "has a misplaced tool call"
            )
        content = _content(turn, content_key, what)
        if role != "tool":
            return {"role": role, "content": content, **name}
        return {"role": "tool", "content": content, **_named(turn, "tool_call_id", "tool_call_id", what), **name}

    if role == "call":
        calls = _calls(_unpacked(turn.get(content_key)), what)
        content = ""
    else:
        calls = _calls(_unpacked(turn["tool_calls"]), what) if turn.get("tool_calls") else []
        if turn.get("function_call"):
            calls.append(_call(turn["function_call"], what))
        content = "" if calls and turn.get(content_key) is None else _content(turn, content_key, what)
    thoughts = next((turn[key] for key in _REASONING_KEYS if turn.get(key)), "")
    message = _answer(content, what, _text(thoughts, f"the reasoning of {what}"), calls)
    if weight is not None:
        if weight not in (0, 1):
            _refuse(
                f"has a weight in {what} that is neither 0 nor 1:",
                weight,
                "An assistant message's weight is 0 or 1.",
                "has a weight other than 0 or 1",
            )
        message["weight"] = int(weight)
    return message | name


def _answer(content: str, what: str, thoughts: str = "", calls: list[Row] | None = None) -> Message:
    """An assistant's message; thoughts that lead its text become its reasoning."""
    if "<think>" in content and what != "`text`" and (match := _THOUGHTS.match(content)):
        if thoughts:
            raise Bad(f"has reasoning of its own and a <think> in {what}", "Keep one of them.", "has its reasoning twice")
        thoughts, content = match[1].strip("\n"), content[match.end() :]
    if not calls and (not content or content.isspace()):
        raise Bad(
            f"has an empty answer in {what}", "Write the answer that the model should give, or remove the row.", "has an empty answer"
        )
    message: Message = {"role": "assistant", "content": content}
    if thoughts and not thoughts.isspace():
        message["reasoning"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return message


def _content(turn: Row, key: str, what: str) -> str:
    """Text, or a list of text parts as one text."""
    if key not in turn:
        raise Bad(f"has no `{key}` in {what}", f'Write it as {{"role": ..., "{key}": ...}}.', "has a message without content")
    content = turn[key]
    if not isinstance(content, list):
        return _text(content, what)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        if kind != "text" or not isinstance(part, dict):
            _refuse(
                f"has a content part in {what} that is no text:",
                kind,
                "Only text can be trained; remove the row.",
                "has a content part that is no text",
            )
        texts.append(_text(part.get("text"), what))
    return "".join(texts)


def _calls(calls: Any, what: str) -> list[Row]:
    return [_call(call, what) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any, what: str) -> Row:
    """{"id", "type": "function", "function": {"name", "arguments"}}, or {"name", "arguments"} alone."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Bad(
            f"has a tool call without a function's name in {what}",
            'Write it as {"type": "function", "function": {"name": ..., "arguments": "{...}"}}.',
            "has a tool call without a name",
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        if not isinstance(_json(arguments), dict):
            _refuse(
                f"has tool arguments in {what} that are no JSON object:",
                arguments,
                'Write them as a JSON object, "{}" if there are none.',
                "has tool arguments that are no JSON object",
            )
    elif isinstance(arguments, dict):
        arguments = _dump(arguments)
    else:
        raise Bad(
            f"has a {kind_of(arguments)} as tool arguments in {what}",
            "Write them as a JSON object.",
            "has tool arguments that are no JSON object",
        )
    return {"name": function["name"], "arguments": arguments, **_named(call, "id", "id", what)}


def _tools(row: Row, format: str) -> str | None:
    """The tools on offer as the text of a JSON list, each as {"type": "function", "function": {...}}."""
    key = "toolConfig" if format == "bedrock" else "tools" if row.get("tools") else "functions"
    tools = row.get(key)
    if not tools:
        return None
    if format == "bedrock":
        tools = look_up(tools, "tools") if isinstance(tools, dict) else None
    elif isinstance(tools, str):
        tools = _json(tools)
    if not isinstance(tools, list):
        raise Bad(f"has `{key}` that are no list", "Give it a JSON list of functions.")
    wrapped = []
    for tool in tools:
        if format == "bedrock" and isinstance(tool, dict) and isinstance(spec := tool.get("toolSpec"), dict):
            schema = {"parameters": look_up(spec, "inputSchema.json")} if "inputSchema" in spec else {}
            tool = {**{k: v for k, v in spec.items() if k in ("name", "description")}, **schema}
        if isinstance(tool, dict) and "function" not in tool:
            tool = {"type": "function", "function": tool}
        if not isinstance(tool, dict) or not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise Bad(f"has a tool without a name in `{key}`", 'Write it as {"type": "function", "function": {"name": ..., ...}}.')
        wrapped.append(tool)
    return _dump(wrapped) if wrapped else None


# -- values ------------------------------------------------------------------------------------------------------------------


def _text(value: Any, what: str) -> str:
    if type(value) is str:
        return value
    raise Bad(
        f"has a {kind_of(value)} where {what} needs text", "Write the content as one string.", f"has a {kind_of(value)} where text belongs"
    )


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": _text(row["system"], "`system`")}] if row["system"] else []


def _named(source: Row, ours: str, theirs: str, what: str) -> Row:
    """{ours: its text} where the source has it."""
    value = source.get(theirs)
    return {} if value is None else {ours: _text(value, f"`{theirs}` of {what}")}


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise Bad(
            f"has {'an empty list' if value == [] else 'a ' + kind_of(value)} where {what} needs a list",
            "Give it a list.",
            "has no list where one belongs",
        )
    return value


def _dict(value: Any, what: str) -> Row:
    if not isinstance(value, dict):
        raise Bad(f"has a {kind_of(value)} in {what}", f"Write rows like {SHAPES['bedrock']}.", "has a block that is no object")
    return value


def _unpacked(value: Any) -> Any:
    """Lists and objects that a table could only hold as text."""
    return value if not isinstance(value, str) or value[:1] not in ("[", "{") else _json(value, value)


def _json(text: str, otherwise: Any = None) -> Any:
    try:
        orjson.loads(
            text
        )  # knows what is no JSON (NaN, half characters), which json lets pass; json keeps long integers, which orjson does not
        return json.loads(text)
    except (ValueError, RecursionError):
        return otherwise


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        raise Bad("has tools or tool arguments that are nested too deep", "Make them flatter.") from None


def _refuse(what: str, value: Any, remedy: str, kind: str = "") -> NoReturn:
    raise Bad(f"{what} {json.dumps(value, ensure_ascii=False, default=str)[:80]}", remedy, kind or what.rstrip(":"))


def kind_of(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
