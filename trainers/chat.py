"""Conversations -> token ids and what is supervised. Pure; the data workers, the proof and the server all come through here.

A conversation's text is what the chat template renders. It is encoded piece by piece, and every assistant turn starts a fresh
piece: ids = encode(prefix) + encode(answer). So what training puts before an answer is, id for id, what the server sends when
it asks for that answer.

Two ways lead to the pieces. Where the template was traced to copy texts without looking at them (`Template.skeleton`), all
conversations of one shape (the same roles) share a `Plan`, and nothing is rendered: texts fill its blanks. Every other
conversation (tools, reasoning, templates that look at texts) is rendered, and so is what stands before each of its answers.

Two kinds of special token are kept apart. *Control* tokens are those that the template writes (and bos, eos, pad, unk):
they become their ids, and are refused inside message text. All other special strings (`<filename>`, say) are plain text
to training and serving alike, because what a user typed must never act as a command to the model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainers.errors import DataError, TemplateError, UserError
from trainers.template import Ask, Blank, Skeleton, Slot, Template, builtin, builtin_names, load_template
from trainers.tokens import Backend, Encoder, Place, TokenBytes, token_bytes, whole_tokenizer

MASK_VERSION = 3  # raise it whenever ids or weights of any conversation change: it is part of every token store's key

Message = dict[str, Any]
"""`{"role": str, "content": str}`; roles are system, user, assistant and tool. An assistant's may carry `weight` (0: context only),
`reasoning` (str) and `tool_calls`
(`[{"name": str, "arguments": str of JSON[, "id": str]}]`); others `name` and, a tool's, `tool_call_id`."""

_PROBE: list[Message] = [{"role": "user", "content": "Hello, what is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
_PLAIN = frozenset({"role", "content", "weight"})

Shape = tuple[tuple[str, bool], ...]
"""Role of each message, and whether it is empty."""

_MOST_PLANNED = 64  # messages: a plan is made of the skeletons before every answer, which pays where its shape comes again
_MOST_RENDERED = 2**28  # characters of what stands before every answer of one conversation, which all are in memory at once

_OTHER_MODEL = "Choose another base model or another `model.template`."


@dataclass(frozen=True)
class Example:
    """A conversation, or its beginning, ready to train on."""

    ids: np.ndarray
    """int32 [T]."""
    spans: tuple[tuple[int, int], ...]
    """Supervised stretches [start, stop) of tokens, in order; the first token of all is never supervised."""
    stop: int
    """It holds the first `stop` messages: all of them, unless the template had to be rendered turn by turn."""

    @property
    def weights(self) -> list[float]:
        """Loss weight of each token as a target."""
        weights = [0.0] * len(self.ids)
        for start, stop in self.spans:
            weights[start:stop] = [1.0] * (stop - start)
        return weights


class Plan(NamedTuple):
    """How the conversations of one shape become ids: fixed ids, a text, fixed ids, a text, ..., fixed ids."""

    fixed: tuple[np.ndarray, ...]
    """int32; one more than there are texts."""
    texts: tuple[Skeleton, ...]
    """Parts of each text."""
    places: tuple[Place, ...]
    """Where each text stands."""
    turns: tuple[tuple[int, int, int, int, int], ...]
    """(message, fixed tokens before it, texts before it, fixed tokens before its end, texts before its end) of each assistant turn."""

    def pieces(self, num_fixed: int, num_texts: int) -> list[Any]:
        """The first `num_fixed` fixed tokens and `num_texts` texts, in order."""
        pieces: list[Any] = []
        for n, ids in enumerate(self.fixed[: num_texts + 1]):
            pieces += [*ids[: max(num_fixed, 0)].tolist(), *([(self.texts[n], self.places[n])] if n < num_texts else [])]
            num_fixed -= len(ids)
        return pieces


class Chat:
    """A model's tokenizer and chat template. Thread-safe, and cheap to pickle towards a process that had it before."""

    def __init__(self, tokenizer_json: str, special: dict[str, str], template: str, backend: Backend = "hf") -> None:
        """`special` maps bos_token, eos_token, pad_token and unk_token to their text, as far as the model has them."""
        self._source = (tokenizer_json, special, template)
        self.tokenizer_json = tokenizer_json
        self.backend = backend
        self.template = template
        self.template_sha256 = hashlib.sha256(template.encode()).hexdigest()
        self.tokenizer_sha256 = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        self.tokenizer = whole_tokenizer(tokenizer_json)
        self.encoder = Encoder(tokenizer_json, backend)
        self._template = Template(template, special)
        self._skeleton = functools.lru_cache(maxsize=4096)(self._template.skeleton)  # plans of one beginning share it
        self._plans: dict[tuple[Shape, bool], Plan | None] = {}
        self._prefixed: dict[Shape, bool] = {}

        asked = [Ask(self._wire(_PROBE), None, False), Ask(self._wire(_PROBE[:1]), None, True)]
        rendered = [self._or_raise(text) for text in self._template.render(asked)]
        added = {t.content: id for id, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        written = template + "".join(rendered)
        self.control = {text: id for text, id in added.items() if text in written or text in special.values()}
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
        self.end_of_turn = self._find_end_of_turn(rendered[0])
        """Text of the control token that closes an assistant turn."""
        ends = {self.end_of_turn, special["eos_token"], "<|eom_id|>"}  # the last one closes Llama 3's calls of built-in tools
        self.ends = frozenset(ends & set(self.control))
        """Texts of all control tokens that may close an assistant turn."""
        self.stop_ids = frozenset(self.control[text] for text in self.ends)
        begin = special.get("bos_token", "")
        # Where it opens every turn (SmolLM2's <|im_start|>), it begins turns and not texts.
        self._bos = [self.control[begin]] if begin and rendered[0].startswith(begin) and rendered[0].count(begin) == 1 else []
        self._check_tokenizer(rendered[0])

    @classmethod
    def load(cls, model_dir: Path, template: str = "auto", backend: Backend = "hf") -> Chat:
        """Read a Hugging Face folder: tokenizer.json, tokenizer_config.json and, for `auto`, its own chat template.

        `template` is a spec's `model.template`, or a template's text. Raises TemplateError.
        """
        model_dir = Path(model_dir)
        try:
            tokenizer_json = (model_dir / "tokenizer.json").read_text(encoding="utf-8")
            config = json.loads((model_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TemplateError(
                f"{model_dir.name} has no readable tokenizer: {error}.", "It needs tokenizer.json and tokenizer_config.json."
            ) from None
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(name)
            value = value["content"] if isinstance(value, dict) else value
            if value is not None:
                special[name] = value
        return cls(tokenizer_json, special, _template_source(model_dir, config, template, tokenizer_json), backend)

    def with_backend(self, backend: Backend) -> Chat:
        """The same chat on another tokenizer backend."""
        return self if backend == self.backend else _shared(self._source[0], tuple(self._source[1].items()), self._source[2], backend)

    def __reduce__(self) -> tuple[Any, ...]:
        tokenizer_json, special, template = self._source
        return _shared, (tokenizer_json, tuple(special.items()), template, self.backend)

    # -- the ways in -------------------------------------------------------------------------------------------------

    def prompt(self, messages: list[Message], tools: str | None = None) -> list[int]:
        """Ids to send to the model so that it writes the next assistant turn."""
        if (slots := _shape(messages, tools)) and (plan := self._plan(slots, True)):
            texts = self._fill(plan, messages)
            self._refuse_control_tokens(messages, tools, texts)
            pieces: list[Sequence[int]] = [plan.fixed[0].tolist()]
            for text, place, fixed in zip(texts, plan.places, plan.fixed[1:], strict=True):
                pieces += [self.encoder.encode(text, place), fixed.tolist()]
            return [i for piece in pieces for i in piece]
        self._refuse_control_tokens(messages, tools)
        _refuse_endless(messages, tools)
        turns = _turns(messages)
        text, *prefixes = self._renders([(len(messages), True), *((k, True) for k in turns)], messages, tools)
        return self._cut(text, dict(zip(turns, prefixes, strict=True)))[0]

    def text_prompt(self, text: str) -> list[int]:
        """Ids of a text that the model goes on with: those that a row of plain text is trained with, without its end."""
        return self._plain_text(text).ids[:-1].tolist()

    def prompts(self, messages: list[Message], tools: str | None = None) -> dict[int, list[int]]:
        """`prompt` of what stands before each assistant turn, by the turn's index."""
        return {k: self.prompt(messages[:k], tools) for k in _turns(messages)}

    def example(self, messages: list[Message], train_on: str = "assistant", tools: str | None = None) -> Example:
        """One conversation as one example; raises what `examples` gives, and TemplateError where it would take several examples."""
        (made,) = self.examples([{"messages": messages, "tools": tools}], train_on)
        if isinstance(made, UserError):
            raise made
        if len(made) > 1:
            raise TemplateError("The chat template rewrites earlier turns.", "Train on the last answer only.")
        return made[0]

    def examples(
        self, conversations: Sequence[dict[str, Any]], train_on: str = "assistant", reasoning: str = "train"
    ) -> list[list[Example] | UserError]:
        """Examples of each conversation, or why it makes none; supervised are the assistant's text and its end-of-turn token, nothing else.

        Mostly one example each; one for every trained turn where the template rewrites earlier turns (drops old reasoning, say).
        `train_on` is "assistant" (every assistant turn of weight 1) or "last_assistant"; `reasoning` is `data.reasoning` of the spec
        ("drop" is the caller's: it removes the key). DataError: control tokens in text, nothing to train on. TemplateError: not renderable.
        """
        made: list[list[Example] | UserError | None] = [None] * len(conversations)
        planned: list[tuple[int, Plan, list[str], list[int], int]] = []
        slow: list[int] = []
        for i, conversation in enumerate(conversations):
            messages, tools = conversation["messages"], conversation.get("tools")
            try:
                if conversation.get("text"):
                    made[i] = [self._plain_text(messages[0]["content"])]
                    continue
                turns = trained_turns(messages, train_on)
                if not turns:
                    raise DataError(
                        "No assistant turn is trained.", "Give at least one assistant message a weight of 1, or remove the example."
                    )
                slots = _shape(messages, tools)
                plan = self._plan(slots, False) if slots else None
                if plan is None:
                    self._refuse_control_tokens(messages, tools)
                    _refuse_endless(messages, tools)
                    slow.append(i)
                else:
                    texts = self._fill(plan, messages)
                    self._refuse_control_tokens(messages, tools, texts)
                    planned.append((i, plan, texts, turns, len(messages)))
            except UserError as error:
                made[i] = error
        self._assemble(planned, made)
        self._render_and_cut(slow, conversations, train_on, reasoning, made)
        return made  # type: ignore[return-value]  # every place was filled

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without control tokens."""
        control = set(self.control.values())
        return self.tokenizer.decode([i for i in ids if i not in control], skip_special_tokens=False)

    def render(self, messages: list[Message], add_generation_prompt: bool = False, tools: str | None = None) -> str:
        """The template's text of a conversation."""
        return self._renders([(len(messages), add_generation_prompt)], messages, tools)[0]

    def render_all(self, asked: list[tuple[list[Message], str | None, bool]]) -> list[str | TemplateError]:
        """The template's text of many conversations: (messages, tools, whether to ask for an answer)."""
        return self._template.render(Ask(self._wire(messages), _parsed(tools) if tools else None, gen) for messages, tools, gen in asked)

    # -- what the proof asks -----------------------------------------------------------------------------------------

    def shape(self, conversation: dict[str, Any]) -> Shape | None:
        """The roles of a conversation whose texts the template copies without looking at them; None for any other conversation."""
        shape = None if conversation.get("text") else _shape(conversation["messages"], conversation.get("tools"))
        return shape if shape and self._plan(shape, False) is not None else None

    def prompts_are_prefixes(self, shape: Shape) -> bool:
        """Whether every prompt of this shape is made of the very pieces that stand before the answer in training."""
        if shape not in self._prefixed:
            if len(self._prefixed) >= 4096:
                self._prefixed.clear()
            plan = self._plan(shape, False)
            prompts = [self._plan(shape[:k], True) for k, (role, _) in enumerate(shape) if role == "assistant"]
            self._prefixed[shape] = plan is not None and all(
                prompt is not None and prompt.pieces(sum(map(len, prompt.fixed)), len(prompt.texts)) == plan.pieces(fixed, texts)
                for (_, fixed, texts, _, _), prompt in zip(plan.turns, prompts, strict=True)
            )
        return self._prefixed[shape]

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """What each id says."""
        return token_bytes(self._source[0])

    def said(self, text: str, cuts: Sequence[int] = ()) -> bytes:
        """What the ids of a rendered text must say, after the tokenizer's normaliser; `cuts` are the characters where answers begin."""
        return b"".join(self.encoder.said(piece, place) if place else piece.encode() for piece, place in self._pieces(text, cuts))

    def text_said(self, text: str) -> bytes:
        """The same for a row of plain text, which is trained as it is."""
        said = self.encoder.said(text, "after" if self._bos else "start")
        return self.token_bytes.say(self._bos) + said + self.token_bytes.say([self.eos_id])

    def encode_rendered(self, text: str, cuts: Sequence[int]) -> list[int]:
        """Ids of a rendered text, its answers beginning at these characters."""
        pieces = [
            [self.control[piece]] if place is None else self.encoder.encode(piece, place) for piece, place in self._pieces(text, cuts)
        ]
        return [id for piece in pieces for id in piece]

    @staticmethod
    def tool_names(tools: str | None) -> list[str]:
        """Names of the functions on offer."""
        return [tool["function"]["name"] for tool in _parsed(tools)] if tools else []

    # -- by plan -----------------------------------------------------------------------------------------------------

    def _plan(self, shape: Shape, generation_prompt: bool) -> Plan | None:
        key = (shape, generation_prompt)
        if key not in self._plans:
            if len(self._plans) >= 4096:  # of millions of shapes, few come twice
                self._plans.clear()
            self._plans[key] = self._make_plan(tuple(Slot(*slot) for slot in shape), generation_prompt)
        return self._plans[key]

    def _make_plan(self, slots: tuple[Slot, ...], generation_prompt: bool) -> Plan | None:
        """Cut the skeleton where answers begin and end; None where that cannot be said for every text of this shape."""
        whole = self._skeleton(slots, generation_prompt)
        if whole is None:
            return None
        starts: dict[int, tuple[int, int]] = {}  # assistant message -> (part, offset in it) where its turn begins
        for k, slot in enumerate(slots):
            if slot.role == "assistant":
                prefix = self._skeleton(slots[:k], True)
                at = _follow(prefix, whole) if prefix is not None else None
                if at is None:
                    return None
                starts[k] = at

        fixed: list[list[int]] = [[]]
        texts: list[Skeleton] = []
        places: list[Place] = []
        turns = []
        open_turn: tuple[int, int, int] | None = None
        piece: list[str | Blank] = []
        place: Place = "start"

        def flush() -> None:
            nonlocal place
            if any(isinstance(part, Blank) for part in piece):
                texts.append(tuple(piece))
                places.append(place)
                fixed.append([])
            elif piece:
                fixed[-1] += self.encoder.encode("".join(map(str, piece)), place)
            if piece:
                place = "continue"
            piece.clear()

        def here() -> tuple[int, int]:
            return sum(map(len, fixed)), len(texts)

        for number, part in enumerate(whole):
            cuts = sorted((offset, k) for k, (n, offset) in starts.items() if n == number)
            literal, at = (part, 0) if isinstance(part, str) else ("", 0)
            for offset, k in [*cuts, (len(literal), -1)]:
                for text in self._split.split(literal[at:offset]):
                    if text in self.control:
                        flush()
                        fixed[-1].append(self.control[text])
                        place = "after"
                        if open_turn is not None and text in self.ends:
                            turns.append((*open_turn, *here()))
                            open_turn = None
                    elif text:
                        piece.append(text)
                at = offset
                if k >= 0:
                    if open_turn is not None:
                        return None  # the turn before has no end
                    flush()
                    open_turn = (k, *here())
            if isinstance(part, Blank):
                if open_turn is not None and part.message != open_turn[0]:
                    return None  # another message's text inside an answer
                piece.append(part)
        flush()
        if open_turn is not None or len(turns) != len(starts):
            return None
        return Plan(tuple(np.array(ids, np.int32) for ids in fixed), tuple(texts), tuple(places), tuple(turns))

    @staticmethod
    def _fill(plan: Plan, messages: list[Message]) -> list[str]:
        filled = []
        for text in plan.texts:
            parts = [
                part if isinstance(part, str) else messages[part[0]]["content"].strip() if part[1] else messages[part[0]]["content"]
                for part in text
            ]
            filled.append(parts[0] if len(parts) == 1 else "".join(parts))
        return filled

    def _assemble(self, planned: list[tuple[int, Plan, list[str], list[int], int]], made: list[list[Example] | UserError | None]) -> None:
        """Encode all texts at once and put ids and spans together."""
        all_texts = [text for _, _, texts, _, _ in planned for text in texts]
        ids, offsets = self.encoder.encode_all(all_texts, [place for _, plan, _, _, _ in planned for place in plan.places])
        bounds = offsets.tolist()
        at = 0
        for i, plan, texts, trained, length in planned:
            stop = at + len(texts)
            parts = [plan.fixed[0]]
            for n, fixed in zip(range(at, stop), plan.fixed[1:], strict=True):
                parts += (ids[bounds[n] : bounds[n + 1]], fixed)
            spans = tuple(
                (before + bounds[at + texts_before] - bounds[at], before_end + bounds[at + texts_before_end] - bounds[at])
                for message, before, texts_before, before_end, texts_before_end in plan.turns
                if message in trained
            )
            made[i] = [Example(np.concatenate(parts), spans, length)]
            at = stop

    # -- by rendering ------------------------------------------------------------------------------------------------

    def _render_and_cut(
        self,
        slow: list[int],
        conversations: Sequence[dict[str, Any]],
        train_on: str,
        reasoning: str,
        made: list[list[Example] | UserError | None],
    ) -> None:
        """Render these conversations whole and before each answer; where that does not fit together, turn by turn."""
        asked: list[tuple[list[Message], str | None, bool]] = []
        for i in slow:
            messages, tools = conversations[i]["messages"], conversations[i].get("tools")
            asked.append((messages, tools, False))
            asked += [(messages[:k], tools, True) for k in _turns(messages)]
            asked += [(messages[: k + 1], tools, False) for k in trained_turns(messages, train_on)]
        answers = iter(self.render_all(asked))
        for i in slow:
            messages = conversations[i]["messages"]
            turns, trained = _turns(messages), trained_turns(messages, train_on)
            found = [next(answers) for _ in range(1 + len(turns) + len(trained))]
            try:
                text, *rest = [self._or_raise(answer) for answer in found]
                prefixes = dict(zip(turns, rest, strict=False))
                alone = dict(zip(trained, rest[len(turns) :], strict=True))
                if all(text.startswith(prefix) for prefix in prefixes.values()) and all(
                    text.startswith(alone[k][: self._end_after(alone[k], len(prefixes[k]))]) for k in trained
                ):
                    made[i] = [self._example_of(messages, text, prefixes, trained, reasoning, len(messages))]
                else:
                    made[i] = [
                        self._example_of(messages, alone[k], {j: p for j, p in prefixes.items() if j <= k}, [k], reasoning, k + 1)
                        for k in trained
                    ]
            except UserError as error:
                made[i] = error

    def _example_of(
        self, messages: list[Message], text: str, prefixes: dict[int, str], trained: list[int], reasoning: str, stop: int
    ) -> Example:
        for k in trained:
            if not text.startswith(prefixes[k]):
                raise TemplateError(
                    f"The chat template rewrites what came before message {k + 1} (assistant), even when that is the last one.",
                    "Begin with a system or user message, or use another `model.template`.",
                )
        ids, turns = self._cut(text, prefixes)
        spans = []
        for k in trained:
            if k not in turns:
                raise TemplateError(f"The chat template does not close message {k + 1} (assistant) with {self.end_of_turn}.", _OTHER_MODEL)
            start, end, answer = turns[k]
            if reasoning == "mask" and messages[k].get("reasoning"):
                at = len(prefixes[k])
                thought = self.said(text[: at + reasoning_end(answer, messages[k])], [at])
                ends = np.cumsum(self.token_bytes.sizes[ids[start:end]])
                start += int(np.searchsorted(ends, len(thought) - len(self.said(text[:at])), "right"))
            spans.append((max(start, 1), end))
        return Example(np.array(ids, np.int32), tuple(spans), stop)

    def _cut(self, text: str, prefixes: dict[int, str]) -> tuple[list[int], dict[int, tuple[int, int, str]]]:
        """Ids of a rendered text, cut where an answer begins; (first token, one past the last, text) of each answer that has an end."""
        cuts, ends = [], {}
        at = 0
        for k, prefix in prefixes.items():
            if not text.startswith(prefix) or len(prefix) < at:
                continue  # rewritten since: whoever asks for this answer sees another text
            cuts.append(len(prefix))
            at = self._end_after(text, len(prefix))
            if at > len(prefix):
                ends[k] = (len(prefix), at)
        ids: list[int] = []
        token_at = {0: 0}  # character -> token, wherever a piece begins or ends
        at = 0
        for piece, place in self._pieces(text, cuts):
            ids += [self.control[piece]] if place is None else self.encoder.encode(piece, place)
            at += len(piece)
            token_at[at] = len(ids)
        return ids, {k: (token_at[start], token_at[stop], text[start:stop]) for k, (start, stop) in ends.items()}

    def _end_after(self, text: str, start: int) -> int:
        """Where the answer that begins at `start` has ended, its end-of-turn token included; `start` where it does not end."""
        return next((m.end() for m in self.control_pattern.finditer(text, start) if m[0] in self.ends), start)

    def _pieces(self, text: str, cuts: Sequence[int] = ()) -> list[tuple[str, Place | None]]:
        """A rendered text in pieces that are encoded apart, each with its place; None marks a control token."""
        pieces: list[tuple[str, Place | None]] = []
        place: Place = "start"
        for start, stop in pairwise([0, *cuts, len(text)]):
            for i, piece in enumerate(self._split.split(text[start:stop])):
                if i % 2:
                    pieces.append((piece, None))
                    place = "after"
                elif piece:
                    pieces.append((piece, place))
                    place = "continue"
        return pieces

    def _plain_text(self, text: str) -> Example:
        self._refuse_control_tokens([{"role": "text", "content": text}], None)
        ids = [*self._bos, *self.encoder.encode(text, "after" if self._bos else "start"), self.eos_id]
        return Example(np.array(ids, np.int32), ((1, len(ids)),), 1)

    # -- the template ------------------------------------------------------------------------------------------------

    def _renders(self, stops: list[tuple[int, bool]], messages: list[Message], tools: str | None) -> list[str]:
        asked = [(messages[:stop], tools, generation_prompt) for stop, generation_prompt in stops]
        return [self._or_raise(text) for text in self.render_all(asked)]

    def _wire(self, messages: list[Message]) -> list[dict[str, Any]]:
        """Messages as templates expect them: tool calls as objects, reasoning in a field or, if the template knows none, in the text."""
        wire = []
        for message in messages:
            sent = {key: message[key] for key in ("role", "content", "name", "tool_call_id") if key in message}
            if thought := message.get("reasoning"):
                if "reasoning_content" in self.template:
                    sent["reasoning_content"] = thought
                else:
                    sent["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
            if calls := message.get("tool_calls"):
                sent["tool_calls"] = [
                    {
                        "type": "function",
                        "function": {"name": call["name"], "arguments": json.loads(call["arguments"])},
                        **({"id": call["id"]} if "id" in call else {}),
                    }
                    for call in calls
                ]
            wire.append(sent)
        return wire

    @staticmethod
    def _or_raise(text: str | TemplateError) -> str:
        if isinstance(text, TemplateError):
            raise text
        return text

    def _refuse_control_tokens(self, messages: list[Message], tools: str | None, texts: list[str] | None = None) -> None:
        """Raise DataError naming the message; `texts`, where the messages were filled into a plan, are searched faster than those."""
        if texts is not None:
            for text in texts:
                for token in self.control:
                    if token in text:
                        break
                else:
                    continue
                break
            else:
                return
        for index, message in enumerate(messages):
            parts = [message["content"], message.get("reasoning", "")]
            parts += [text for call in message.get("tool_calls", ()) for text in (call["name"], call["arguments"])]
            for part in parts:
                if found := self.control_pattern.search(part):
                    raise DataError(
                        f"Message {index + 1} ({message['role']}) contains {found[0]}, a control token of the model's chat template.",
                        "Remove it or spell it otherwise; text must not be able to end a turn or start one.",
                        "messages",
                    )
        if tools and (found := self.control_pattern.search(tools)):
            raise DataError(f"The tools contain {found[0]}, a control token of the model's chat template.", "Spell it otherwise.", "tools")
        if texts is not None:
            raise DataError("A message and the template's words around it form a control token.", "Reword the message.", "messages")

    def _find_end_of_turn(self, rendered: str) -> str:
        _, answer, after = rendered.rpartition(_PROBE[-1]["content"])
        if not answer:
            raise TemplateError("The chat template changes the text of an assistant message.", _OTHER_MODEL)
        end = self.control_pattern.search(after)
        if end is None:
            raise TemplateError(
                "The chat template ends no assistant turn with a special token, so the model would never stop.", _OTHER_MODEL
            )
        return end[0]

    def _check_tokenizer(self, rendered: str) -> None:
        """Encoding piece by piece must give what the tokenizer gives for the whole; some (prefix spaces at the start of a text) do not."""
        whole = self.tokenizer.encode(rendered, add_special_tokens=False).ids
        if self._cut(rendered, {})[0] != whole or self.example(_PROBE).ids.tolist() != whole:
            raise TemplateError("This tokenizer reads a turn differently alone and inside a conversation.", _OTHER_MODEL)


def trained_turns(messages: list[Message], train_on: str) -> list[int]:
    """Indices of the assistant messages that are supervised."""
    turns = _turns(messages)
    return [k for k in (turns[-1:] if train_on == "last_assistant" else turns) if messages[k].get("weight", 1)]


def _turns(messages: list[Message]) -> list[int]:
    return [k for k, message in enumerate(messages) if message["role"] == "assistant"]


def volume(messages: list[Message], tools: str | None) -> int:
    """Characters that are rendered, about, to find out what stands before every answer of a conversation."""
    chars = len(tools or "")
    for message in messages:
        chars += 50 + len(message["content"]) + len(message.get("reasoning", ""))
        chars += sum(len(call["arguments"]) for call in message.get("tool_calls", ()))
    return chars * (1 + len(_turns(messages)))


def _refuse_endless(messages: list[Message], tools: str | None) -> None:
    if volume(messages, tools) > _MOST_RENDERED:
        raise DataError(
            f"The conversation has {len(_turns(messages)):,} answers, too many to render what stands before each of them.",
            "Split it into shorter conversations.",
            "messages",
        )


def _shape(messages: list[Message], tools: str | None) -> Shape | None:
    """What a plan may depend on; None for a conversation with more than texts in it, a text of nothing but white space, or many turns."""
    if tools or len(messages) > _MOST_PLANNED:
        return None
    for message in messages:
        if (len(message) > 2 and not _PLAIN.issuperset(message)) or message["content"].isspace():
            return None
    return tuple([(message["role"], not message["content"]) for message in messages])


def _follow(prefix: Skeleton, whole: Skeleton) -> tuple[int, int] | None:
    """Where in `whole` (part, offset in it) it has said all that `prefix` says; None where it says something else."""
    for number, part in enumerate(prefix):
        if number >= len(whole):
            return None
        other = whole[number]
        if part == other:
            continue
        if number == len(prefix) - 1 and isinstance(part, str) and isinstance(other, str) and other.startswith(part):
            return number, len(part)
        return None
    number = len(prefix)
    return (number - 1, len(prefix[-1])) if prefix and isinstance(prefix[-1], str) else (number, 0)


def reasoning_end(answer: str, message: Message) -> int:
    """Where, in an answer's text, the reasoning is over."""
    content = message["content"].strip()
    if content:
        return max(answer.rfind(content), 0)
    thought = message["reasoning"].strip()
    return answer.find(thought) + len(thought) if thought in answer else 0


def _template_source(model_dir: Path, config: dict[str, Any], template: str, tokenizer_json: str) -> str:
    if template == "auto":
        file = model_dir / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
        if isinstance(source, list):  # several named templates; "default" is the one for plain conversations
            source = next((t["template"] for t in source if t["name"] == "default"), None)
        if not source:
            raise TemplateError(
                f"{model_dir.name} has no chat template.", "Use an instruct model, or name a built-in template as `model.template`."
            )
        return source
    if "{" in template:
        return template
    if template.endswith(".jinja") or "/" in template:
        return load_template(Path(template))
    known = builtin(template)
    if known is None:
        raise TemplateError(
            f"There is no template `{template}`.", f"Built in are {', '.join(builtin_names())}; or name a .jinja file, or auto."
        )
    special = {t["content"] for t in json.loads(tokenizer_json).get("added_tokens", []) if t["special"]}
    if missing := [token for token in known.control if token not in special]:
        raise TemplateError(
            f"The template {template} needs the token {missing[0]}, which {model_dir.name}'s tokenizer does not have.",
            "Leave `model.template` at auto, or choose one that fits the base model.",
        )
    return known.source


@functools.lru_cache(maxsize=256)
def _parsed(tools: str) -> list[Any]:
    """A conversation's tools; whole data sets share a few."""
    return json.loads(tools)


@functools.lru_cache(maxsize=4)
def _shared(tokenizer_json: str, special: tuple[tuple[str, str], ...], template: str, backend: Backend) -> Chat:
    """One Chat per process for each model, however many tasks carry it there."""
    return Chat(tokenizer_json, dict(special), template, backend)
