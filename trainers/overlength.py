"""A conversation that is longer than `max_length`: its prompt is shortened, or its turns are spread. Never is an answer cut.

The result is always a shorter *conversation*, rendered and proven like any other, so that training sees what a server would send.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainers.chat import Message

Conversation = dict[str, Any]
Measure = Callable[[Conversation], int]
"""Tokens of a conversation's longest example."""


def truncate_prompt(conversation: Conversation, max_length: int, measure: Measure) -> Conversation | None:
    """The same last answer after less: the oldest turns go first, then text from the front of the first question that is left.

    System messages stay. None where the answer does not fit with one character of a prompt.
    """
    head, turns = _turns(conversation["messages"])

    def keep(first: int) -> Conversation:
        return {**conversation, "messages": [*head, *(message for turn in turns[first:] for message in turn)]}

    first = _smallest(0, len(turns) - 1, lambda n: measure(keep(n)) <= max_length)
    if first is not None:
        return keep(first)
    last = turns[-1]
    asked = next(i for i, message in enumerate(last) if message["role"] != "system")
    if last[asked]["role"] == "assistant":
        return None
    text = last[asked]["content"]

    def keep_text(cut: int) -> Conversation:
        return {**conversation, "messages": [*head, *last[:asked], {**last[asked], "content": text[cut:]}, *last[asked + 1 :]]}

    cut = _smallest(0, len(text) - 1, lambda n: measure(keep_text(n)) <= max_length)
    return None if cut is None else keep_text(cut)


def split_turns(conversation: Conversation, max_length: int, measure: Measure) -> tuple[list[Conversation], int]:
    """Shorter conversations that together hold every turn once, as many in each as fit, and the number of turns that fit nowhere.

    System messages stand before each of them.
    """
    head, turns = _turns(conversation["messages"])
    parts: list[Conversation] = []
    lost = at = 0
    while at < len(turns):

        def keep(stop: int, start: int = at) -> Conversation:
            return {**conversation, "messages": [*head, *(message for turn in turns[start:stop] for message in turn)]}

        # Growing by doubling keeps the number of renders small where thousands of turns fit.
        stop = at
        step = 1
        while step:
            if stop + step <= len(turns) and measure(keep(stop + step)) <= max_length:
                stop, step = stop + step, step * 2
            else:
                step //= 2
        if stop == at:
            lost, at = lost + 1, at + 1
        else:
            parts.append(keep(stop))
            at = stop
    return parts, lost


def _turns(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(leading system messages, turns): a turn is what is asked and all that answers it. What follows the last answer is left out."""
    num_head = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    turns: list[list[Message]] = []
    for before, message in zip([None, *messages[num_head:]], messages[num_head : last + 1], strict=False):
        if before is None or (before["role"] == "assistant" and message["role"] in ("user", "system")):
            turns.append([])
        turns[-1].append(message)
    return messages[:num_head], turns


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest number in [low, high] for which `holds` (false below some number, true from there on), or None."""
    if low > high or not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
