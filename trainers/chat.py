"""Messages -> token ids and loss weights. Pure; the data workers, the proof and the server all come through here.

A conversation is rendered by the model's own chat template and encoded turn by turn: every assistant turn starts a fresh
piece, ids = encode(prefix) + encode(answer). So what training puts before an answer is, id for id, what the server sends
when it asks for that answer.

Two kinds of special token are kept apart. *Control* tokens are those that the template writes (and bos, eos, pad, unk):
they become their ids, and are refused inside message text. All other special strings (`<filename>`, say) are plain text
to training and serving alike, because what a user typed must never act as a command to the model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from trainers.errors import DataError, TemplateError

ROLES = ("system", "user", "assistant", "tool")
MASK_VERSION = 1  # raise it whenever ids or weights of any conversation change: it is part of every token store's key

Message = dict[str, Any]
"""`{"role": one of ROLES, "content": str}`; an assistant message may carry `"weight": 0` (context only, not trained)."""

_PROBE: list[Message] = [{"role": "user", "content": "Hello, what is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]

_OTHER_MODEL = "Choose another base model, or give its folder another chat_template.jinja."


@dataclass(frozen=True)
class Example:
    """A whole conversation: `weights[t]` is the loss weight of token `t` as a target; `weights[0] == 0`."""

    ids: list[int]
    weights: list[float]


class Chat:
    """A model's tokenizer and chat template. Thread-safe, and cheap to pickle towards a process that had it before."""

    def __init__(self, tokenizer_json: str, special: dict[str, str], template: str) -> None:
        """`special` maps bos_token, eos_token, pad_token and unk_token to their text, as far as the model has them."""
        self._source = (tokenizer_json, special, template)
        self.template = template
        self.template_sha256 = hashlib.sha256(template.encode()).hexdigest()
        self.tokenizer_sha256 = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self._plain = Tokenizer.from_str(tokenizer_json)
        self._plain.encode_special_tokens = True  # reads special strings as the plain text that they are in a message
        for tokenizer in (self.tokenizer, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._special = special
        self._template = _compile(template)
        self._encode_short = functools.lru_cache(maxsize=1024)(self._encode_plain)

        rendered = self.render(_PROBE) + self.render(_PROBE[:1], add_generation_prompt=True)
        added = {t.content: id for id, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        self.control = {text: id for text, id in added.items() if text in template or text in rendered or text in special.values()}
        """Text -> id of each control token."""
        if not self.control:
            raise TemplateError("The chat template writes no special token, so a turn has no end.", _OTHER_MODEL)
        self.control_pattern = re.compile("|".join(re.escape(t) for t in sorted(self.control, key=len, reverse=True)))
        """Matches any control token in text."""
        self._split = re.compile(f"({self.control_pattern.pattern})")
        if special.get("eos_token") not in self.control:
            raise TemplateError(
                f"The eos token {special.get('eos_token')!r} is not a special token of the tokenizer.", "Mend tokenizer_config.json."
            )
        self.eos_id: int = self.control[special["eos_token"]]
        self.end_of_turn = self._find_end_of_turn()
        """Text of the control token that closes an assistant turn."""
        self.stop_ids = frozenset({self.control[self.end_of_turn], self.eos_id})
        self._check_tokenizer()

    @classmethod
    def load(cls, model_dir: Path) -> Chat:
        """Read a Hugging Face folder: tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja."""
        model_dir = Path(model_dir)
        try:
            tokenizer_json = (model_dir / "tokenizer.json").read_text(encoding="utf-8")
            config = json.loads((model_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TemplateError(
                f"{model_dir.name} has no readable tokenizer: {error}.", "It needs tokenizer.json and tokenizer_config.json."
            ) from None
        file = model_dir / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
        if isinstance(template, list):  # several named templates; "default" is the one for plain conversations
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if not template:
            raise TemplateError(f"{model_dir.name} has no chat template.", "Use an instruct model, or add chat_template.jinja.")
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(name)
            value = value["content"] if isinstance(value, dict) else value
            if value is not None:
                special[name] = value
        return cls(tokenizer_json, special, template)

    def __reduce__(self) -> tuple[Any, ...]:
        tokenizer_json, special, template = self._source
        return _shared, (tokenizer_json, tuple(special.items()), template)

    # -- the two ways in ---------------------------------------------------------------------------------------------

    def prompt(self, messages: list[Message]) -> list[int]:
        """Ids to send to the model so that it writes the next assistant turn."""
        return self._encode(messages, add_generation_prompt=True)[0]

    def prompts(self, messages: list[Message]) -> dict[int, list[int]]:
        """`prompt(messages[:k])` for the index k of every assistant turn; no prefix is rendered twice."""
        prefixes: dict[int, str] = {}
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        return {k: self._encode(messages[:k], add_generation_prompt=True, prefixes=prefixes)[0] for k in turns}

    def example(self, messages: list[Message], train_on: str = "assistant") -> Example:
        """Ids and weights of a whole conversation; supervised are the assistant's text and its end-of-turn token, nothing else.

        `train_on` is "assistant" (every assistant turn) or "last_assistant". Raises DataError for text with control tokens and
        for a conversation without a supervised token, TemplateError where the template cannot render it.
        """
        ids, turns = self._encode(messages, add_generation_prompt=False)
        weights = [0.0] * len(ids)
        for index, start, stop in turns[-1:] if train_on == "last_assistant" else turns:
            if messages[index].get("weight", 1):
                weights[start:stop] = [1.0] * (stop - start)
        if not any(weights):
            raise DataError("No assistant turn is trained.", "Give at least one assistant message a weight of 1, or remove the example.")
        return Example(ids, weights)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without control tokens."""
        control = set(self.control.values())
        return self.tokenizer.decode([i for i in ids if i not in control], skip_special_tokens=False)

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The template's text of a conversation."""
        try:
            return self._template.render(
                messages=[{"role": m["role"], "content": m["content"]} for m in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise TemplateError(
                f"The model's chat template refuses the conversation: {error}.", "Change the order or the roles of its messages."
            ) from None

    # -- how ---------------------------------------------------------------------------------------------------------

    def _encode(
        self, messages: list[Message], add_generation_prompt: bool, prefixes: dict[int, str] | None = None
    ) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Ids of the conversation and, for each assistant turn, (message index, first id, one past its end-of-turn token).

        `prefixes` remembers, for a caller that asks about one conversation again and again, the render of its first k messages.
        """
        prefixes = {} if prefixes is None else prefixes

        def prefix_of(index: int) -> str:
            if index not in prefixes:
                prefixes[index] = self.render(messages[:index], add_generation_prompt=True)
            return prefixes[index]

        self._refuse_control_tokens(messages)
        text = prefix_of(len(messages)) if add_generation_prompt else self.render(messages)
        ids: list[int] = []
        turns = []
        at = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prefix = prefix_of(index)
            if not text.startswith(prefix) or len(prefix) < at:
                raise TemplateError(
                    f"The chat template rewrites what came before message {index + 1} (assistant).",
                    "Begin with a system or user message; a template that changes earlier turns cannot be trained on several turns.",
                )
            end = self.control_pattern.search(text, len(prefix))  # message text holds no control token: this is the template's own
            if end is None or end[0] != self.end_of_turn:
                raise TemplateError(
                    f"The chat template does not close message {index + 1} (assistant) with {self.end_of_turn}.", _OTHER_MODEL
                )
            ids += self._encode_text(text[at : len(prefix)])
            start = len(ids)
            ids += self._encode_text(text[len(prefix) : end.end()])
            turns.append((index, start, len(ids)))
            at = end.end()
        ids += self._encode_text(text[at:])
        return ids, turns

    def _encode_text(self, text: str) -> list[int]:
        """Control tokens become their ids, all between them is encoded as plain text."""
        ids: list[int] = []
        for i, piece in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self.control[piece])
            elif piece:
                ids += self._encode_short(piece) if len(piece) <= 1024 else self._encode_plain(piece)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _refuse_control_tokens(self, messages: list[Message]) -> None:
        for index, message in enumerate(messages):
            if found := self.control_pattern.search(message["content"]):
                raise DataError(
                    f"Message {index + 1} ({message['role']}) contains {found[0]}, a control token of the model's chat template.",
                    "Remove it or spell it otherwise; text must not be able to end a turn or start one.",
                    "messages",
                )

    def _find_end_of_turn(self) -> str:
        _, answer, after = self.render(_PROBE).rpartition(_PROBE[-1]["content"])
        if not answer:
            raise TemplateError("The chat template changes the text of an assistant message.", _OTHER_MODEL)
        end = self.control_pattern.search(after)
        if end is None:
            raise TemplateError(
                "The chat template ends no assistant turn with a special token, so the model would never stop.", _OTHER_MODEL
            )
        return end[0]

    def _check_tokenizer(self) -> None:
        """Encoding piece by piece must give what the tokenizer gives for the whole; some (prefix spaces at the start of a text) do not."""
        whole = self.tokenizer.encode(self.render(_PROBE), add_special_tokens=False).ids
        if self._encode(_PROBE, add_generation_prompt=False)[0] != whole:
            raise TemplateError("This tokenizer reads a turn differently alone and inside a conversation.", _OTHER_MODEL)


@functools.lru_cache(maxsize=4)
def _shared(tokenizer_json: str, special: tuple[tuple[str, str], ...], template: str) -> Chat:
    """One Chat per process for each model, however many tasks carry it there."""
    return Chat(tokenizer_json, dict(special), template)


def _compile(template: str) -> jinja2.Template:
    """The environment that chat templates are written for: trimmed blocks, `tojson` without HTML escapes, `raise_exception`.

    `strftime_now` stays undefined on purpose (templates that offer today's date fall back to a fixed one): with it the same
    conversation would have other ids tomorrow.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise TemplateError(f"The chat template is not valid Jinja: {error}.", "Mend chat_template.jinja of the base model.") from None
