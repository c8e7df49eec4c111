"""The choice of the engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from serve.engines import open_engine
from serve.transformers_engine import TransformersEngine
from trainers.errors import UserError


def test_without_a_gpu_transformers_answers(tiny: Path) -> None:
    engine = open_engine({"model_dir": str(tiny)})
    try:
        assert isinstance(engine, TransformersEngine)
    finally:
        engine.close()


def test_an_engine_that_is_not_there_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match="no engine `tgi`"):
        open_engine({"model_dir": str(tiny), "engine": "tgi"})
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(UserError, match="vLLM is not installed"):
            open_engine({"model_dir": str(tiny), "engine": "vllm"})
