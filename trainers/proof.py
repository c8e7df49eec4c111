"""The mask proof: ids and supervised spans of every example against the template's own text.

It shares no arithmetic with what built the mask. Where each message stands is found by rendering the same roles with a
placeholder in place of every text; a template that was seen to copy texts unseen writes the same around real ones, so of its
conversations only a sample is rendered. All others (tools, reasoning, templates that look at texts) are rendered, whole and
before each answer. From then on the bytes that the ids stand for are compared with the bytes of the text at known offsets:

1. the ids say what the template says, after the tokenizer's normaliser;
2. the supervised tokens are, span by span, an assistant's text and its end-of-turn token: no other token is supervised;
3. what stands before each assistant turn is, id for id, what the server will send to the model.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trainers.chat import Chat, Example, Message, Shape, reasoning_end, trained_turns
from trainers.errors import DataError, TemplateError, UserError

_RENDER_EVERY = 16
_PROMPTS = 4  # of one conversation that are made again: the last holds the words of all before it
_REMEDY = "Remove the example, or use another chat template; if both look right, please report it."


class Answer(NamedTuple):
    """Message number `message`, an assistant's, with its end-of-turn token is `text[start:stop]` of the rendered conversation."""

    message: int
    start: int
    stop: int


class Claim(NamedTuple):
    """What is to be proven: these examples are this conversation, supervised as asked."""

    where: str
    conversation: dict[str, Any]
    examples: Sequence[Example]


def prove_all(chat: Chat, claims: Sequence[Claim], train_on: str, reasoning: str = "train", every: int = 256) -> list[UserError | None]:
    """Why each claim does not hold: a DataError or TemplateError naming file, line, turn and token; None where it does.

    Statements 1 and 2 are proven of every claim. The third follows, for conversations of texts, from how their plan is made and from
    the tokenizer: that its backend gives the reference's ids is seen on every `every`-th claim, encoded again by the reference.
    """
    verdicts: list[UserError | None] = [None] * len(claims)
    shapes = [_plain_shape(chat, claim.conversation) if len(claim.examples) == 1 else None for claim in claims]
    quick = {i: shape for i, shape in enumerate(shapes) if shape is not None}
    doubtful = set(range(len(claims))) - quick.keys() | set(range(0, len(claims), every))
    doubtful |= _quick_doubts(chat, claims, quick, train_on)
    slow = sorted(doubtful)
    for i, texts in zip(slow, _render_all(chat, [claims[i] for i in slow], train_on), strict=True):
        try:
            _prove(chat, claims[i], texts, train_on, reasoning, again=i % every == 0)
        except UserError as error:
            verdicts[i] = error
    return verdicts


def prove(chat: Chat, messages: list[Message], example: Example, train_on: str, where: str) -> None:
    """Raise what `prove_all` says of one conversation that is one example; all of it is encoded again by the reference."""
    (verdict,) = prove_all(chat, [Claim(where, {"messages": messages, "tools": None}, [example])], train_on)
    if verdict is not None:
        raise verdict


class _Wanted(NamedTuple):
    """What the ids of an example must say, and at which of its bytes supervised spans start and stop, in turn."""

    example: Example
    said: bytes
    edges: list[int]


def _quick_doubts(chat: Chat, claims: Sequence[Claim], quick: dict[int, Shape], train_on: str) -> set[int]:
    """Those of the claims in `quick` (number -> shape) that do not hold at first sight; all arithmetic on one array of ids.

    The template was seen to copy these texts without a look, so what it writes around placeholders it writes around them; every
    16th is rendered for all that, and so is each with white space at the ends of a text, which a template may strip.
    """
    wanted: dict[int, _Wanted | None] = {}
    rendered = []
    for n, (i, shape) in enumerate(quick.items()):
        (example,) = claims[i].examples
        wanted[i] = _around(chat, claims[i].conversation["messages"], shape, example, train_on) if n % _RENDER_EVERY else None
        if wanted[i] is None:
            rendered.append(i)
    texts = chat.render_all([(claims[i].conversation["messages"], None, False) for i in rendered])
    for i, text in zip(rendered, texts, strict=True):
        (example,) = claims[i].examples
        wanted[i] = _in_text(chat, claims[i].conversation["messages"], example, train_on, text)

    certain = [found for found in wanted.values() if found is not None]
    doubts = {i for i, found in wanted.items() if found is None or not chat.prompts_are_prefixes(quick[i])}
    if certain and not _holds(chat, certain):
        doubts |= wanted.keys()  # rare: find out which, one by one
    return doubts


def _around(chat: Chat, messages: list[Message], shape: Shape, example: Example, train_on: str) -> _Wanted | None:
    """Put texts where the placeholders were; None where that may not be what the template does, or more than plain bytes."""
    (before, _, lead), *between = _template_bytes(chat, shape)
    trained = trained_turns(messages, train_on)
    said, edges = [before], []
    at = len(before)
    for k, (after, end, next_lead) in enumerate(between):
        content = messages[k]["content"]
        if content.strip() != content or not chat.encoder.is_literal(content):
            return None
        text = content.encode()
        said += (text, after)
        if k in trained:
            edges += (at - lead, at + len(text) + end)
        at += len(text) + len(after)
        lead = next_lead
    return _Wanted(example, b"".join(said), edges)


def _in_text(chat: Chat, messages: list[Message], example: Example, train_on: str, text: str | TemplateError) -> _Wanted | None:
    """The same from the rendered text."""
    if not isinstance(text, str):
        return None
    try:
        answers = locate_answers(chat, messages, text, "")
    except UserError:
        return None
    trained = trained_turns(messages, train_on)
    cuts = [answer.start for answer in answers]
    edges = [edge for answer in answers if answer.message in trained for edge in (answer.start, answer.stop)]
    return _Wanted(example, chat.said(text, cuts), [len(chat.said(text[:edge], [c for c in cuts if c < edge])) for edge in edges])


def _holds(chat: Chat, wanted: Sequence[_Wanted]) -> bool:
    """Whether all of these ids say what they must and are supervised where they must."""
    if any(2 * len(example.spans) != len(edges) for example, _, edges in wanted):
        return False
    ids = np.concatenate([example.ids for example, _, _ in wanted])
    ends = np.concatenate([[0], np.cumsum(chat.token_bytes.sizes[ids])])
    firsts = np.cumsum([0, *(len(example.ids) for example, _, _ in wanted)])
    byte_firsts = np.cumsum([0, *(len(said) for _, said, _ in wanted)])
    tokens = [
        first + edge for first, (example, _, _) in zip(firsts.tolist(), wanted, strict=False) for span in example.spans for edge in span
    ]
    edges = [first + edge for first, (_, _, edges) in zip(byte_firsts.tolist(), wanted, strict=False) for edge in edges]
    said = b"".join([said for _, said, _ in wanted])
    return np.array_equal(ends[firsts], byte_firsts) and np.array_equal(ends[tokens], edges) and chat.token_bytes.says(ids, said)


Texts = dict[tuple[int, bool], str | TemplateError]
"""(number of messages, whether an answer is asked for) -> what the template renders of them."""


def _render_all(chat: Chat, claims: Sequence[Claim], train_on: str) -> list[Texts]:
    """Whatever the proof of each claim asks the template for, in one go."""
    wanted: list[list[tuple[int, bool]]] = []
    for conversation, examples in ((claim.conversation, claim.examples) for claim in claims):
        messages = conversation["messages"]
        stops = {example.stop for example in examples} | {k + 1 for k in trained_turns(messages, train_on)}
        before = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        wanted.append([] if conversation.get("text") else [*((stop, False) for stop in stops), *((k, True) for k in before)])
    asked = [
        (claim.conversation["messages"][:stop], claim.conversation.get("tools"), prompt)
        for claim, keys in zip(claims, wanted, strict=True)
        for stop, prompt in keys
    ]
    answers = iter(chat.render_all(asked))
    return [{key: next(answers) for key in keys} for keys in wanted]


def _prove(chat: Chat, claim: Claim, texts: Texts, train_on: str, reasoning: str, again: bool) -> None:
    """One claim, step by step, with a name for everything that can be wrong; `again`: the reference encodes all of it once more."""
    conversation, where = claim.conversation, claim.where
    if conversation.get("text"):
        (example,) = claim.examples
        text = conversation["messages"][0]["content"]
        right = chat.token_bytes.say(example.ids.tolist()) == chat.text_said(text) and example.spans == ((1, len(example.ids)),)
        _require(right, where, "the tokens are not the text")
        return
    trained = trained_turns(conversation["messages"], train_on)
    whole = len(claim.examples) == 1 and claim.examples[0].stop == len(conversation["messages"])
    claimed = trained if whole else [example.stop - 1 for example in claim.examples]
    _require(claimed == trained, where, f"messages {[k + 1 for k in trained]} are to be trained, but {[k + 1 for k in claimed]} are")
    for example in claim.examples:
        part = trained if whole else [example.stop - 1]
        _prove_one(chat, conversation, example, texts, part, whole, reasoning, where)
        if again:
            _prove_ids(chat.with_backend("hf"), conversation, example, texts, part, where)


def _prove_one(
    chat: Chat, conversation: dict[str, Any], example: Example, texts: Texts, trained: list[int], whole: bool, reasoning: str, where: str
) -> None:
    messages, tools = conversation["messages"][: example.stop], conversation.get("tools")
    text = _text(texts, (example.stop, False), where)
    if _plain_shape(chat, {"messages": messages, "tools": tools}) is not None:
        answers = locate_answers(chat, messages, text, where)
    else:
        answers = _locate_by_prefix(chat, messages, tools, text, texts, trained, whole, where)
    answers = [answer for answer in answers if answer.message in trained]

    cuts = _cuts(text, texts, example.stop)
    if chat.token_bytes.say(example.ids.tolist()) != chat.said(text, cuts):
        _refuse_lost_characters(chat, messages, where)
        _require(False, where, "the tokens do not say what the chat template renders")
    ends = np.concatenate([[0], np.cumsum(chat.token_bytes.sizes[example.ids])])
    spans, found = list(example.spans), 0
    for answer, (start, stop) in zip(answers, spans, strict=False):
        found += 1
        turn = f"message {answer.message + 1} (assistant)"
        first, last = (len(chat.said(text[:edge], [c for c in cuts if c < edge])) for edge in (answer.start, answer.stop))
        if reasoning == "mask" and messages[answer.message].get("reasoning"):
            thought = answer.start + reasoning_end(text[answer.start : answer.stop], messages[answer.message])
            latest = len(chat.said(text[:thought], [c for c in cuts if c < thought]))
            right = first <= ends[start] <= latest < ends[start + 1]
        else:
            right = ends[start] == first
        _require(bool(right), where, f"{turn}: token {start} is the first one supervised, but not where the answer begins")
        _require(bool(ends[stop] == last), where, f"{turn}: supervised tokens {start} to {stop - 1} are not the answer and its end")
    if len(spans) > found:
        _require(False, where, f"token {spans[found][0]} is supervised, but belongs to no answer that is trained")
    if len(answers) > found:
        _require(False, where, f"message {answers[found].message + 1} (assistant) is trained, but has no supervised token")


def _prove_ids(chat: Chat, conversation: dict[str, Any], example: Example, texts: Texts, trained: list[int], where: str) -> None:
    """The third statement, id for id: what the server sends before each answer, and the whole text, in the reference's tokens."""
    ids = example.ids.tolist()
    for k in trained[-_PROMPTS:]:
        prompt = chat.prompt(conversation["messages"][:k], conversation.get("tools"))
        if ids[: len(prompt)] != prompt:
            different = next((t for t, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(ids))
            turn = f"message {k + 1} (assistant)"
            _require(False, where, f"{turn}: from token {different} on, training sees another prompt than the server sends")
    text = _text(texts, (example.stop, False), where)
    right = ids == chat.encode_rendered(text, _cuts(text, texts, example.stop))
    _require(right, where, "the tokens say the text otherwise than the tokenizers library does")


def _text(texts: Texts, key: tuple[int, bool], where: str) -> str:
    text = texts[key]
    if isinstance(text, TemplateError):
        raise TemplateError(f"{where}: {text.message}", text.remedy)
    return text


def _cuts(text: str, texts: Texts, stop: int) -> list[int]:
    """The characters of the rendered text at which an answer's encoding begins afresh: wherever a prompt of it ends."""
    prompts = [rendered for (k, asked), rendered in texts.items() if asked and k < stop]
    return sorted(len(prompt) for prompt in prompts if isinstance(prompt, str) and text.startswith(prompt))


def locate_answers(chat: Chat, messages: list[Message], text: str, where: str) -> list[Answer]:
    """Where each assistant turn, end-of-turn token included, stands in the rendered `text` of a conversation of texts.

    Raises DataError for a template that does more to a message than copy or strip it.
    """
    (before, _, lead), *between = _template_text(chat, tuple([m["role"] for m in messages]))
    answers = []
    at = len(before)
    if not text.startswith(before):
        raise DataError(f"{where}: the chat template changes the text of message 1 ({messages[0]['role']}).", _REMEDY)
    for index, message in enumerate(messages):
        content, (after, end, next_lead) = message["content"], between[index]
        if not text.startswith(after, at + len(content)) or not text.startswith(content, at):
            content = content.strip()
            if not text.startswith(after, at + len(content)) or not text.startswith(content, at):
                raise DataError(f"{where}: the chat template changes the text of message {index + 1} ({message['role']}).", _REMEDY)
        start, at = at, at + len(content)
        if message["role"] == "assistant":
            if end < 0:
                raise DataError(f"{where}: the chat template does not end message {index + 1} (assistant).", _REMEDY)
            answers.append(Answer(index, start - lead, at + end))
        at += len(after)
        lead = next_lead
    if at != len(text):
        raise DataError(f"{where}: the chat template adds text of its own after the last message.", _REMEDY)
    return answers


def _locate_by_prefix(
    chat: Chat, messages: list[Message], tools: str | None, text: str, texts: Texts, trained: list[int], whole: bool, where: str
) -> list[Answer]:
    """The same for any conversation: an answer begins where its prompt ends. Raises DataError where the template loses something."""
    answers = []
    for k in trained:
        prefix, alone = texts[k, True], texts[k + 1, False]
        turn = f"message {k + 1} (assistant)"
        goes_on = isinstance(prefix, str) and text.startswith(prefix)
        _require(goes_on, where, f"{turn}: the conversation does not go on from the server's prompt")
        assert isinstance(prefix, str)
        stop = next((m.end() for m in chat.control_pattern.finditer(text, len(prefix)) if m[0] in chat.ends), -1)
        _require(stop > 0, where, f"the chat template does not end {turn}")
        _require(isinstance(alone, str) and alone.startswith(text[:stop]), where, f"{turn}: the answer depends on what comes after it")
        answers.append(Answer(k, len(prefix), stop))
        answer, message = text[len(prefix) : stop], messages[k]
        parts = [
            message["content"].strip(),
            message.get("reasoning", "").strip(),
            *(call["name"] for call in message.get("tool_calls", ())),
        ]
        _require(all(part in answer for part in parts), where, f"the chat template changes the text of {turn}, or leaves part of it out")
    _require_every_text(messages if whole else messages[-2:], text, where)
    for name in chat.tool_names(tools):
        _require(name in text, where, f"the chat template leaves out the tool `{name}`")
    return answers


def _require_every_text(messages: list[Message], text: str, where: str) -> None:
    """Each text must be there; a tool's may be quoted as JSON, and old reasoning and old calls may be left out."""
    for index, message in enumerate(messages):
        if message["role"] != "tool":
            content = message["content"].strip()
            _require(content in text, where, f"the chat template changes the text of message {index + 1} ({message['role']})")


def _plain_shape(chat: Chat, conversation: dict[str, Any]) -> Shape | None:
    """The shape of a conversation whose texts placeholders can stand for: the template copies them without a look, and none is empty."""
    shape = chat.shape(conversation)
    return None if shape is None or any([empty for _, empty in shape]) else shape


def _require(right: bool, where: str, what: str) -> None:
    if not right:
        raise DataError(f"{where}: {what}.", _REMEDY)


def _refuse_lost_characters(chat: Chat, messages: list[Message], where: str) -> None:
    """Byte-level vocabularies can lack bytes (SmolLM2's cannot write U+0013, say) and drop them without a word."""
    for index, message in enumerate(messages):
        for character in dict.fromkeys(message["content"] + message.get("reasoning", "")):
            if chat.token_bytes.say(chat.encoder.encode(character)) != chat.said(character):
                raise DataError(
                    f"{where}: message {index + 1} ({message['role']}) contains U+{ord(character):04X}, which the tokenizer cannot write.",
                    "Remove the character.",
                )


class _Between(NamedTuple):
    """What the template writes before all messages, or after one of them."""

    text: str
    end: int
    """How much of it ends an answer, or -1."""
    lead: int
    """How much of it, at its end, is already the next answer: the space between `[/INST]` and what the model says, which it must write."""


@functools.lru_cache(maxsize=1024)
def _template_bytes(chat: Chat, shape: Shape) -> list[tuple[bytes, int, int]]:
    """The same in bytes."""
    return [
        (text.encode(), len(text[:end].encode()) if end >= 0 else -1, len(text[len(text) - lead :].encode()))
        for text, end, lead in _template_text(chat, tuple([role for role, _ in shape]))
    ]


@functools.lru_cache(maxsize=1024)
def _template_text(chat: Chat, roles: tuple[str, ...]) -> list[_Between]:
    """What the template itself writes before, between and after messages of these roles."""
    mark = "\ue000"
    messages: list[Message] = [{"role": role, "content": f"{mark}{i}{mark}"} for i, role in enumerate(roles)]
    turns = [k for k, role in enumerate(roles) if role == "assistant"]
    rendered, *prompts = chat.render_all([(messages, None, False), *((messages[:k], None, True) for k in turns)])
    if isinstance(rendered, TemplateError):
        raise rendered
    leads = [0] * (len(roles) + 1)
    for k, prompt in zip(turns, prompts, strict=True):
        lead = rendered.partition(f"{mark}{k}{mark}")[0].removeprefix(str(prompt))
        leads[k] = 0 if lead.strip() else len(lead)  # words are not the model's to write
    parts = []
    for i in range(len(roles)):
        before, found, rendered = rendered.partition(f"{mark}{i}{mark}")
        parts.append(before if found else mark)  # a message that is left out or moved: no text will match a bare mark
    parts.append(rendered)
    ends = [[m.end() for m in chat.control_pattern.finditer(part) if m[0] in chat.ends] for part in parts]
    return [_Between(part, end[0] if end else -1, lead) for part, end, lead in zip(parts, ends, leads, strict=True)]
