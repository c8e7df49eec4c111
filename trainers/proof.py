"""The mask proof: one example's ids and weights against the template's own text.

It shares no arithmetic with what built the mask. Where each message stands is found by rendering the same roles with a
placeholder in place of every text; from then on decoded tokens are compared with text at known character offsets:

1. the ids say what the template says, after the tokenizer's normaliser;
2. the supervised tokens are, run by run, an assistant's text and its end-of-turn token: no other token is supervised;
3. what stands before each assistant turn is, id for id, what the server will send to the model.
"""

from __future__ import annotations

import functools
from itertools import groupby
from typing import NamedTuple

from trainers.chat import Chat, Example, Message
from trainers.errors import DataError

_REMEDY = "Remove the example, or use another chat template; if both look right, please report it."


class Answer(NamedTuple):
    """Message number `message`, an assistant's, with its end-of-turn token is `text[start:stop]` of the rendered conversation."""

    message: int
    start: int
    stop: int


def prove(chat: Chat, messages: list[Message], example: Example, train_on: str, where: str) -> None:
    """Raise DataError naming `where` (file:line), turn and token unless every statement above holds."""
    ids, weights = example.ids, example.weights
    normaliser = chat.tokenizer.normalizer

    def require(right: bool, what: str) -> None:
        if not right:
            raise DataError(f"{where}: {what}.", _REMEDY)

    def normal(text: str) -> str:
        return normaliser.normalize_str(text) if normaliser else text

    def reads(start: int, stop: int, first: int, last: int) -> bool:
        """Whether tokens start..stop say the rendered characters first..last."""
        return normal(chat.tokenizer.decode(ids[start:stop], skip_special_tokens=False)) == normal(text[first:last])

    text = chat.render(messages)
    answers = locate_answers(chat, messages, text, where)
    trained = [a for a in (answers[-1:] if train_on == "last_assistant" else answers) if messages[a.message].get("weight", 1)]
    runs = _supervised_runs(weights)

    require(len(ids) == len(weights), f"{len(ids)} tokens have {len(weights)} weights")
    if not reads(0, len(ids), 0, len(text)):
        _refuse_lost_characters(chat, messages, where)
        require(False, "the tokens do not decode to what the chat template renders")
    token = char = 0
    for answer, (start, stop) in zip(trained, runs, strict=False):
        turn = f"message {answer.message + 1} (assistant)"
        require(
            reads(token, start, char, answer.start), f"{turn}: token {start} is the first one supervised, but not where the answer begins"
        )
        require(
            reads(start, stop, answer.start, answer.stop), f"{turn}: supervised tokens {start} to {stop - 1} are not the answer and its end"
        )
        token, char = stop, answer.stop
    if len(runs) > len(trained):
        require(False, f"token {runs[len(trained)][0]} is supervised, but belongs to no answer that is trained")
    if len(trained) > len(runs):
        require(False, f"message {trained[len(runs)].message + 1} (assistant) is trained, but has no supervised token")

    starts = {answer.message: start for answer, (start, _) in zip(trained, runs, strict=True)}
    prompts = chat.prompts(messages)
    for answer in answers:
        prompt = prompts[answer.message]
        turn = f"message {answer.message + 1} (assistant)"
        if ids[: len(prompt)] != prompt:
            different = next((t for t, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(ids))
            require(False, f"{turn}: from token {different} on, training sees another prompt than the server sends")
        require(
            starts.get(answer.message, len(prompt)) == len(prompt),
            f"{turn}: the prompt has {len(prompt)} tokens, the answer starts elsewhere",
        )


def locate_answers(chat: Chat, messages: list[Message], text: str, where: str) -> list[Answer]:
    """Where each assistant turn, end-of-turn token included, stands in the rendered `text`.

    Raises DataError for a template that does more to a message than copy or strip it.
    """
    between = _template_text(chat, tuple(m["role"] for m in messages))
    answers = []
    at = len(between[0])
    for index, message in enumerate(messages):
        content, after = message["content"], between[index + 1]
        if not text.startswith(content + after, at):
            content = content.strip()
        if not text.startswith(content + after, at) or not text.startswith(between[0]):
            raise DataError(f"{where}: the chat template changes the text of message {index + 1} ({message['role']}).", _REMEDY)
        start, at = at, at + len(content)
        if message["role"] == "assistant":
            end = chat.control_pattern.search(after)
            if end is None or chat.control[end[0]] not in chat.stop_ids:
                raise DataError(f"{where}: the chat template does not end message {index + 1} (assistant).", _REMEDY)
            answers.append(Answer(index, start, at + end.end()))
        at += len(after)
    if at != len(text):
        raise DataError(f"{where}: the chat template adds text of its own after the last message.", _REMEDY)
    return answers


def _refuse_lost_characters(chat: Chat, messages: list[Message], where: str) -> None:
    """Byte-level vocabularies can lack bytes (SmolLM2's cannot write U+0013, say) and drop them without a word."""
    for index, message in enumerate(messages):
        for character in dict.fromkeys(message["content"]):
            if chat.decode(chat.tokenizer.encode(character, add_special_tokens=False).ids) != character:
                raise DataError(
                    f"{where}: message {index + 1} ({message['role']}) contains U+{ord(character):04X}, which the tokenizer cannot write.",
                    "Remove the character.",
                )


@functools.lru_cache(maxsize=1024)
def _template_text(chat: Chat, roles: tuple[str, ...]) -> list[str]:
    """What the template itself writes before, between and after messages of these roles."""
    mark = "\ue000"
    rendered = chat.render([{"role": role, "content": f"{mark}{i}{mark}"} for i, role in enumerate(roles)])
    parts = []
    for i in range(len(roles)):
        before, found, rendered = rendered.partition(f"{mark}{i}{mark}")
        parts.append(before if found else mark)  # a message that is left out or moved: no text will match a bare mark
    return [*parts, rendered]


def _supervised_runs(weights: list[float]) -> list[tuple[int, int]]:
    """[start, stop) of every stretch of tokens with a weight above zero."""
    runs = []
    at = 0
    for supervised, stretch in groupby(weights, key=lambda w: w > 0):
        start, at = at, at + sum(1 for _ in stretch)
        if supervised:
            runs.append((start, at))
    return runs
