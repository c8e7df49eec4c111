"""Makes the golden files: what each model's own published template, or its makers' own encoder, says to four conversations.

    pip install -e '.[dev]' sentencepiece mistral-common==1.13.1 llama-models==0.3.0   (a scratch environment)
    python -m tests.golden.make

Published templates are read out of packages that carry them, and are not part of this repository; texts and ids are. Where a
published template and its makers' encoder differ, a `note` says which of them is golden.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import PreTrainedTokenizerFast

from tests.golden.fetch import Package, python_package, tokenizer_of

HERE = Path(__file__).parent

TEMPLATES = {
    "llama2": Package(
        "transformers",
        "4.40.0",
        "transformers/models/llama/tokenization_llama_fast.py",
        "89cf78a47276fadc7f62084b58ce2216bc9b069fbd951953efe4dc4c93c9cb9c",
    ),
    "llama3": Package(
        "trl", "1.16.0", "trl/chat_templates/llama3_1.jinja", "e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65"
    ),
    "gemma": Package("trl", "1.16.0", "trl/chat_templates/gemma.jinja", "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6"),
    "chatml": Package(
        "trl", "1.16.0", "trl/chat_templates/qwen3_instruct_2507.jinja", "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326"
    ),
    "mistral": Package(
        "kani", "1.10.0", "kani/model_specific/mistral.py", "177db56a56a7d20a80f28634ea2e6e068e8f147300a6fac8e21c45afdf108b47"
    ),
    "vicuna": Package("fschat", "0.2.36", "fastchat/conversation.py", "65ce1cbc5cdde97de69714748713faba1efd3e27094a21ec87aae26c0653009b"),
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a place, in °C.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}, "required": ["place"]},
    },
}
QUESTION = {"role": "user", "content": "  What's the capital of Österreich?\n"}
ANSWER = {"role": "assistant", "content": "Wien (Vienna), 2.0 million people 🎡."}
CASES: dict[str, dict[str, Any]] = {
    "single": {"messages": [QUESTION, ANSWER]},
    "system": {"messages": [{"role": "system", "content": "You answer briefly."}, QUESTION, ANSWER]},
    "multi_turn": {
        "messages": [
            {"role": "user", "content": "Write f(x) = x² in Python"},
            {"role": "assistant", "content": "```python\ndef f(x):\n    return x ** 2\n```"},
            {"role": "user", "content": "And  12345 * 678?"},
            {"role": "assistant", "content": " 8369910 "},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "How warm is it in Zürich?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "get_weather", "arguments": '{"place": "Zürich", "days": 1}', "id": "callZ0001"}],
            },
            {"role": "tool", "content": '{"celsius": 21.5}', "tool_call_id": "callZ0001"},
            {"role": "assistant", "content": "It is 21.5 °C in Zürich."},
        ],
        "tools": json.dumps([WEATHER], ensure_ascii=False),
    },
}


class Reference(NamedTuple):
    tokenizer: str
    special: dict[str, str]
    render: Callable[[Any, list[dict[str, Any]], Any, bool], str]
    """(tokenizer, messages as templates read them, tools, generation prompt) -> text; raises where the format has no such thing."""
    source: str
    official: Callable[[list[dict[str, Any]], Any], list[int]] | None = None
    """Ids of a whole conversation from the makers' own encoder."""


def template(name: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        text = python_package(TEMPLATES[name], Path(scratch)).read_text(encoding="utf-8")
    if name == "llama2":  # a string in the middle of a method
        method = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == "default_chat_template")
        [text] = [str(n.value) for n in ast.walk(method) if isinstance(n, ast.Constant) and "{% endfor %}" in str(n.value)]
        return text.replace("USE_DEFAULT_PROMPT", "false")
    if name == "mistral":  # commented out, line by line
        lines = [line[2:] for line in text.splitlines() if line.startswith("# ")]
        return "\n".join(
            lines[lines.index('{%- if messages[0]["role"] == "system" %}') : lines.index("{%- endfor %}", len(lines) // 3 * 2) + 1]
        )
    return text


def by_template(name: str) -> Callable[..., str]:
    source = template(name)

    def render(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=source, add_generation_prompt=generation_prompt, tokenize=False
        )

    return render


def alpaca(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, generation_prompt: bool) -> str:
    """As Stanford's train.py joins PROMPT_DICT["prompt_no_input"], the output and eos; its tokenizer adds bos."""
    if tools or [m["role"] for m in messages] not in (["user"], ["user", "assistant"]):
        raise ValueError("one turn, no system message, no tools")
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ).format(instruction=messages[0]["content"])
    return "<s>" + prompt + "".join(m["content"] + "</s>" for m in messages[1:])


def vicuna() -> Callable[..., str]:
    with tempfile.TemporaryDirectory() as scratch:
        spec = importlib.util.spec_from_file_location("conversation", python_package(TEMPLATES["vicuna"], Path(scratch)))
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

    def render(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, generation_prompt: bool) -> str:
        conversation = module.get_conv_template("vicuna_v1.1")
        if tools:
            raise ValueError("no tools")
        if messages[0]["role"] == "system":
            conversation.set_system_message(messages[0]["content"])
            messages = messages[1:]
        for message in messages:
            conversation.append_message({"user": "USER", "assistant": "ASSISTANT"}[message["role"]], message["content"])
        if generation_prompt:
            conversation.append_message("ASSISTANT", None)
        return "<s>" + conversation.get_prompt()

    return render


def mistral() -> Callable[..., str]:
    published = by_template("mistral")

    def render(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, generation_prompt: bool) -> str:
        if messages[0]["role"] == "system" and not generation_prompt:  # see the note
            return published(tokenizer, messages[:-1], tools, True) + " " + messages[-1]["content"] + "</s>"
        return published(tokenizer, messages, tools, generation_prompt)

    return render


def mistral_official(messages: list[dict[str, Any]], tools: Any) -> list[int]:
    from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.request import InstructRequest
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    def official(message: dict[str, Any]) -> Any:
        if message["role"] == "user":
            return UserMessage(content=message["content"])
        if message["role"] == "tool":
            return ToolMessage(content=message["content"], tool_call_id=message["tool_call_id"])
        calls = [
            ToolCall(id=c["id"], function=FunctionCall(name=c["function"]["name"], arguments=c["function"]["arguments"]))
            for c in message.get("tool_calls", [])
        ]
        return AssistantMessage(content=message["content"] or None, tool_calls=calls or None)

    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    request = InstructRequest(
        messages=[official(m) for m in messages if m["role"] != "system"],
        system_prompt=system,
        available_tools=[Tool.model_validate(t) for t in tools] if tools else None,
    )
    return list(MistralTokenizer.v3().instruct_tokenizer.encode_instruct(request).tokens)


def llama3_official(messages: list[dict[str, Any]], tools: Any) -> list[int]:
    """Meta's encoder writes what the template puts into system message, calls and results as messages' contents."""
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    date = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    texts = [("system", ("Environment: ipython\n" if tools else "") + date + system)]
    for message in messages:
        if message["role"] == "system":
            continue
        text = message["content"].strip()
        if message["role"] == "tool":
            text = json.dumps(message["content"])
        elif "tool_calls" in message:
            call = message["tool_calls"][0]["function"]
            text = f'{{"name": "{call["name"]}", "parameters": {json.dumps(call["arguments"], ensure_ascii=False)}}}'
        elif tools and len(texts) == 1:
            text = (
                "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
                'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument name '
                "and its value}.Do not use variables.\n\n"
                + "".join(json.dumps(t, indent=4, ensure_ascii=False) + "\n\n" for t in tools)
                + text
            )
        texts.append((message["role"], text))
    raw = [RawMessage(role=role, content=text, **({"call_id": "x"} if role == "tool" else {})) for role, text in texts]
    dialog = ChatFormat(Tokenizer.get_instance()).encode_dialog_prompt(raw).tokens
    return dialog[: -len(ChatFormat(Tokenizer.get_instance())._encode_header("assistant"))]


def wire(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates read them: calls as objects."""

    def call(c: dict[str, Any]) -> dict[str, Any]:
        return {"type": "function", "function": {"name": c["name"], "arguments": json.loads(c["arguments"])}, "id": c["id"]}

    return [{**m, "tool_calls": [call(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]


def main() -> None:
    llama = {"bos_token": "<s>", "eos_token": "</s>"}
    stanford = "Stanford's train.py: PROMPT_DICT['prompt_no_input'] + output + eos"
    references = {
        "alpaca": Reference("llama2", llama, alpaca, stanford),
        "chatml": Reference("qwen3", {"eos_token": "<|im_end|>"}, by_template("chatml"), _said("chatml")),
        "gemma": Reference("gemma2", {"bos_token": "<bos>", "eos_token": "<eos>"}, by_template("gemma"), _said("gemma")),
        "llama2": Reference("llama2", llama, by_template("llama2"), _said("llama2")),
        "llama3": Reference(
            "llama3.1",
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
            by_template("llama3"),
            _said("llama3"),
            llama3_official,
        ),
        "mistral": Reference("mistral-v3", llama, mistral(), _said("mistral"), mistral_official),
        "vicuna": Reference("llama2", llama, vicuna(), _said("vicuna")),
    }
    for name, reference in references.items():
        golden = {"tokenizer": reference.tokenizer, "special": reference.special, "source": reference.source, "cases": {}}
        for case, given in CASES.items():
            golden["cases"][case] = {**given, **_said_by(reference, given)}
        if name == "mistral":
            golden["cases"]["multi_turn"]["note"] = (
                "The published template strips answers; Mistral's own encoder keeps a space before them."
            )
            golden["cases"]["system"]["note"] = (
                "The published template leaves the system message out of a conversation that ends with an answer; golden is its text "
                "of the prompt, then the answer, as Mistral's own encoder has it."
            )
        text = json.dumps(golden, ensure_ascii=False, indent=1)
        (HERE / f"{name}.json").write_text(re.sub(r"\[[\s\d,]+\]", lambda ids: re.sub(r"\s+", " ", ids[0]), text) + "\n", encoding="utf-8")


def _said(name: str) -> str:
    package = TEMPLATES[name]
    return f"{package.file} of {package.name} {package.version}"


def _said_by(reference: Reference, given: dict[str, Any]) -> dict[str, Any]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_of(reference.tokenizer) / "tokenizer.json"), **reference.special)
    messages, tools = wire(given["messages"]), json.loads(given["tools"]) if "tools" in given else None
    try:
        text = reference.render(tokenizer, messages, tools, False)
    except Exception as error:  # of whatever kind the reference refuses with
        return {"refused": str(error)}
    prompt = reference.render(tokenizer, messages[:-1], tools, True)
    ids, prompt_ids = (tokenizer.encode(t, add_special_tokens=False) for t in (text, prompt))
    said: dict[str, Any] = {"text": text, "ids": ids, "prompt": prompt, "prompt_ids": prompt_ids}
    if reference.official and (official := reference.official(messages, tools)) != ids:
        said["official_ids"] = official
        said["official_says"] = tokenizer.decode(official)
    return said


if __name__ == "__main__":
    main()
