"""Answers that are held to a form: whatever a random model at temperature 1 says, every finished answer fits."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from serve.engine import ANY_OBJECT, GenerateRequest, TokenEvent
from serve.grammar import Grammars
from serve.transformers_engine import TransformersEngine
from trainers.chat import Chat
from trainers.errors import UserError

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny, dtype=torch.float32, num_threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def grammars(tiny: Path) -> Grammars:
    return Grammars(Chat.load(tiny), 300)


def ask(engine: TransformersEngine, *requests: GenerateRequest) -> list[list[TokenEvent] | BaseException]:
    async def collect(request: GenerateRequest) -> list[TokenEvent]:
        return [event async for event in engine.generate(request) if isinstance(event, TokenEvent)]

    async def main() -> Any:
        return await asyncio.gather(*(collect(r) for r in requests), return_exceptions=True)

    return asyncio.run(main())


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """One that a random model can finish: strings and arrays are bounded."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    if depth:
        kinds += ["object", "object", "array", "anyOf"]
    kind = rng.choice(kinds)
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-c]{2,4}$", "^(yes|no)$", r"^\d{4}-\d{2}$"])}
    if kind in ("integer", "number"):
        low = rng.randint(-50, 50)
        return {"type": kind, "minimum": low, "maximum": low + rng.randint(0, 90)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "grün", 3, None, True, 'a"b\\c', "\n"], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["x", 12, False, "né 🦊"])}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    if kind == "object":
        names = rng.sample(["a", "b c", "ключ", "d-e", "f"], rng.randint(0, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": [name for name in names if rng.random() < 0.7],
            "additionalProperties": False,
        }
    return {"type": kind}


def test_every_finished_answer_fits_its_schema(engine: TransformersEngine) -> None:
    rng = random.Random(5)
    schemas = [random_schema(rng) for _ in range(60)]
    requests = [
        GenerateRequest(prompt_ids=[5 + i, 9], json_schema=json.dumps(s), temperature=1.0, top_p=(1.0, 0.9)[i % 2], max_tokens=400, seed=i)
        for i, s in enumerate(schemas)
    ]
    num_finished = 0
    for form, events in zip(schemas, ask(engine, *requests), strict=True):
        assert not isinstance(events, BaseException), events
        if events[-1].finish_reason == "stop":
            jsonschema.validate(json.loads("".join(e.text for e in events)), form)
            num_finished += 1
    assert num_finished > 50


def test_any_object(engine: TransformersEngine, tiny: Path) -> None:
    # The tiny model hardly ever closes a string: a bias towards quotes and braces makes it.
    chat = Chat.load(tiny)
    bias = {id: 8.0 for text in '"}' for id in chat.encoder.encode(text, "continue")}
    requests = [GenerateRequest(prompt_ids=[5], json_schema=ANY_OBJECT, max_tokens=300, seed=s, logit_bias=bias) for s in range(12)]
    texts = []
    for events in ask(engine, *requests):
        assert not isinstance(events, BaseException), events
        if events[-1].finish_reason == "stop":
            texts.append("".join(e.text for e in events))
    assert len(texts) > 6 and all(isinstance(json.loads(t), dict) for t in texts)
    assert any(len(t) > 2 for t in texts)


def test_others_in_the_batch_are_free(engine: TransformersEngine) -> None:
    free = [GenerateRequest(prompt_ids=[7, 8, 9 + i], max_tokens=20, seed=i, temperature=float(i % 2)) for i in range(4)]
    bound = [GenerateRequest(prompt_ids=[7, 8], json_schema=json.dumps(PERSON), max_tokens=60, seed=i) for i in range(4)]
    alone = [ask(engine, request)[0] for request in free]
    together = ask(engine, *free, *bound)
    assert together[:4] == alone


def test_an_answer_ends_only_when_it_is_complete(engine: TransformersEngine, tiny: Path) -> None:
    stop_ids = Chat.load(tiny).stop_ids
    bias = dict.fromkeys(stop_ids, 100.0)  # it would end at once
    (events,) = ask(engine, GenerateRequest(prompt_ids=[5], json_schema=json.dumps(PERSON), max_tokens=200, logit_bias=bias, seed=3))
    assert not isinstance(events, BaseException)
    assert not stop_ids & {e.id for e in events[:-1]}
    jsonschema.validate(json.loads("".join(e.text for e in events)), PERSON)


def test_control_tokens_are_no_text(grammars: Grammars, tiny: Path) -> None:
    chat = Chat.load(tiny)
    follower = grammars.follow('{"type": "string"}')
    follower.take(chat.encoder.encode('"', "continue")[0])
    allowed = follower.allowed(chat.stop_ids)
    special = [id for id, token in chat.tokenizer.get_added_tokens_decoder().items() if token.special]
    assert special and not allowed[special].any() and allowed.sum() > 150


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"type": "foo"}', "foo"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-around"),
        ('{"type": "string", "pattern": "("}', "unclosed group"),
        ('{"$ref": "https://example.org/schema"}', "example.org"),
        ('{"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}', "Nothing fits the form asked for"),
        ('{"enum": []}', "empty"),
        ('{"a', "EOF|Unterminated"),
        ("[]", "object"),
        ("3", "object"),
        ('{"items":' * 100 + "{}" + "}" * 100, "64 levels"),
        ('{"x":' * 100_000 + "1" + "}" * 100_000, "characters"),
        ('{"items":' * 20_000 + "{}" + "}" * 20_000, "recursion"),
        ('{"type": "array", "items": {"type": "string"}, "minItems": 1000000000}', "minItems is 1000000000"),
        ('{"type": "string", "maxLength": 1e300}', "maxLength"),
        ('{"type": "string", "pattern": "(a{1000}){1000}"}', "repeats too often"),
        ('{"type": "object", "patternProperties": {"a{999999999999999}": {}}}', "repeats too often"),
        ('{"type": "integer", "multipleOf": 999983}', "multipleOf"),
        (json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(9000)}}), "characters"),
    ],
)
def test_what_cannot_be_compiled_is_refused(grammars: Grammars, text: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        grammars.follow(text)
    assert caught.value.status == 400 and caught.value.param == "response_format" and len(str(caught.value)) < 700


def test_the_engine_refuses_before_it_begins(engine: TransformersEngine) -> None:
    (error,) = ask(engine, GenerateRequest(prompt_ids=[5], json_schema='{"type": "foo"}'))
    assert isinstance(error, UserError) and "JSON schema" in str(error)
    assert engine.num_running == 0


def test_kept_grammars_are_bounded(tiny: Path) -> None:
    from serve import grammar as module

    grammars = Grammars(Chat.load(tiny), 300)
    for i in range(module.MOST_KEPT + 5):
        grammars.follow(f'{{"const": {i}}}')
    assert len(grammars._kept) == module.MOST_KEPT


def test_two_followers_of_one_grammar_go_their_own_ways(grammars: Grammars, tiny: Path) -> None:
    chat = Chat.load(tiny)
    one, other = (grammars.follow('{"const": 17}') for _ in range(2))
    a, b = (chat.encoder.encode(text, "continue")[0] for text in "17")
    one.take(a)
    assert one.allowed(chat.stop_ids)[b] and not one.allowed(chat.stop_ids)[a] and other.allowed(chat.stop_ids)[a]
    one.take(b)
    assert one.is_complete and not other.is_complete and one.allowed(chat.stop_ids)[list(chat.stop_ids)].all()
