"""vLLM and transformers over the same SmolLM2, both in fp32. Collected only where vLLM is installed: see `make test-vllm`."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from serve.engine import Engine, GenerateRequest, PromptEvent, TokenEvent

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def vllm_engine(smollm: Path) -> Iterator[Any]:
    """The engine that most tests share: three adapters at most."""
    import torch

    from serve.vllm_engine import VLLMEngine

    engine = VLLMEngine(smollm, torch.float32, max_adapters=3, max_adapter_rank=16)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def reference(smollm: Path) -> Iterator[Engine]:
    import torch

    from serve.transformers_engine import TransformersEngine

    engine = TransformersEngine(smollm, torch.float32)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def lora_folders(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four random adapters, strong enough that each says something else."""
    folder = tmp_path_factory.mktemp("loras")
    return [make_lora(smollm, folder / f"lora-{i}", seed=i, rank=rank) for i, rank in enumerate((8, 4, 16, 4))]


def make_lora(model_dir: Path, folder: Path, seed: int, rank: int) -> str:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.6 / rank**0.5)
    model.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def prompts(smollm: Path) -> list[list[int]]:
    from trainers.chat import Chat

    chat = Chat.load(smollm)
    asked = (
        "What is the capital of France?",
        "Write one sentence about the sea.",
        "Name three colours.",
        "How many legs does a spider have?",
        "Translate 'good morning' into Spanish.",
        "Why is the sky blue? Answer briefly.",
    )
    return [chat.prompt([{"role": "user", "content": text}]) for text in asked]


Events = list[TokenEvent | PromptEvent]


def ask(engine: Engine, *requests: GenerateRequest) -> list[Events]:
    """The events of requests that run at the same time."""

    async def collect(request: GenerateRequest) -> Events:
        async with aclosing(engine.generate(request)) as events:
            return [event async for event in events]

    async def all_of_them() -> list[Events]:
        return list(await asyncio.gather(*(collect(r) for r in requests)))

    return asyncio.run(all_of_them())


def said(events: Events) -> str:
    return "".join(e.text for e in events if isinstance(e, TokenEvent))


def ids(events: Events) -> list[int]:
    return [e.id for e in events if isinstance(e, TokenEvent)]
