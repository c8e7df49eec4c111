"""The engine on a device that is not the CPU (simulated, and a GPU where there is one): every tensor is where it belongs, the answers are
the CPU's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.engine import GenerateRequest, PromptEvent, TokenEvent
from serve.transformers_engine import TransformersEngine
from tests.serve.test_transformers_engine import everything, prompt
from tests.simulated import DEVICE, Held, Misplaced, movable

PERSON = json.dumps({"type": "object", "properties": {"age": {"type": "integer", "maximum": 150}}, "required": ["age"]})


def test_the_device_refuses_what_gpus_refuse() -> None:
    with torch.inference_mode():
        held = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=DEVICE)
        assert isinstance(held[0], Held) and held[0].tolist() == [1.0, 2.0] and float(held[1, 1] + torch.tensor(1.0)) == 5.0
        assert held.to("cpu").tolist() == held.tolist() and not isinstance(held.to("cpu"), Held)
        held[0] += 1
        assert held.sum().item() == 12
        for misplaced in (lambda: held + torch.ones(2), lambda: torch.ones(2, 2) @ held, lambda: held.index_select(0, torch.tensor([0]))):
            with pytest.raises(Misplaced):
                misplaced()


@pytest.mark.parametrize("device", [DEVICE, *([torch.device("cuda")] if torch.cuda.is_available() else [])], ids=str)
def test_an_engine_on_a_device(tiny: Path, adapters: list[str], device: torch.device) -> None:
    fields: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 3},
        {"top_p": 0.8},
        {"top_k": 9, "prompt_ids": prompt(400)},
        {"frequency_penalty": 1.0, "presence_penalty": 0.5, "logit_bias": {7: 2.0}},
        {"json_schema": PERSON, "max_tokens": 60},
        {"prompt_logprobs": 2, "logprobs": 1},
        {"prompt_logprobs": 0, "max_tokens": 0},
        {"prompt_ids": [*prompt(9), 5, 6], "temperature": 0.5, "top_p": 0.99, "top_k": 200},
        {"prompt_ids": prompt(450)},
    ]
    requests = [
        GenerateRequest(**{"prompt_ids": prompt(9 + 20 * i), "adapter": (None, *adapters)[i % 4], "max_tokens": 30, "seed": i, **more})
        for i, more in enumerate(fields)
    ]
    told = []
    for place in (torch.device("cpu"), device):
        with movable():
            engine = TransformersEngine(tiny, dtype=torch.float32, device=place, num_threads=1)
        told.append(everything(engine, *requests) + everything(engine, *requests[:3]))
        engine.close()
    assert {p.device.type for p in engine._model.parameters()} == {device.type}
    for a, b in zip(*told, strict=True):
        assert [said(e) for e in a] == [said(e) for e in b]
        assert [p for e in a for p in logprobs(e)] == pytest.approx([p for e in b for p in logprobs(e)], abs=1e-5)


def said(event: TokenEvent | PromptEvent) -> Any:
    ids = [[id for id, _ in top] for top in (event.top if isinstance(event, PromptEvent) else [event.top])]
    return (ids, event.id, event.text, event.finish_reason) if isinstance(event, TokenEvent) else ids


def logprobs(event: TokenEvent | PromptEvent) -> list[float]:
    tops = event.top if isinstance(event, PromptEvent) else [event.top]
    own = event.logprobs if isinstance(event, PromptEvent) else [event.logprob]
    return [p for p in own if p is not None] + [p for top in tops for _, p in top]
