"""What every engine refuses alike."""

from __future__ import annotations

from typing import Any

import pytest

from serve.engine import GenerateRequest
from serve.limits import most_tokens
from trainers.errors import UserError


def asked(**fields: Any) -> int:
    return most_tokens(GenerateRequest(**{"prompt_ids": [1, 2, 3], **fields}), context=10, vocab_size=100)


def test_an_answer_takes_what_is_left_or_what_is_asked_for() -> None:
    assert asked() == 7
    assert asked(max_tokens=7) == 7
    assert asked(max_tokens=2) == 2
    assert asked(max_tokens=0, prompt_logprobs=0) == 0
    assert asked(prompt_ids=[1] * 10, max_tokens=0, prompt_logprobs=1) == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_ids": []}, "prompt"),
        ({"prompt_ids": [0, -1]}, "prompt"),
        ({"prompt_ids": [100]}, "prompt"),
        ({"prompt_ids": [1] * 10}, "messages"),
        ({"prompt_ids": [1] * 11, "max_tokens": 0, "prompt_logprobs": 0}, "messages"),
        ({"max_tokens": 8}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {100: 1.0}}, "logit_bias"),
    ],
)
def test_what_a_model_cannot_be_asked(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UserError) as told:
        asked(**fields)
    assert told.value.param == param
