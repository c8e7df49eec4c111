"""Which engine answers: transformers' everywhere, vLLM's where it is installed and a GPU is there, or where it is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from serve.engine import Engine
from trainers.errors import UserError


def open_engine(args: dict[str, Any]) -> Engine:
    """The engine of serve.app.build's args, with its model loaded: `engine` (auto, transformers or vllm), `model_dir`, and what one of the
    engines takes: `max_adapter_bytes` (transformers); `max_adapters`, `max_adapters_in_batch`, `max_adapter_rank` and `vllm` (vLLM's own
    engine arguments). Raises UserError for an engine that is not there.
    """
    kind = args.get("engine", "auto")
    has_vllm = importlib.util.find_spec("vllm") is not None
    if kind not in ("auto", "transformers", "vllm"):
        raise UserError(f"There is no engine `{kind}`.", "Use auto, transformers or vllm.", "engine")
    if kind == "vllm" and not has_vllm:
        raise UserError("vLLM is not installed here.", "Install tuneyard[vllm], or use engine: transformers.", "engine")
    model_dir = Path(args["model_dir"])
    if kind == "vllm" or (kind == "auto" and has_vllm and _has_gpu()):
        from serve.vllm_engine import VLLMEngine

        limits = {k: args[k] for k in ("max_adapters", "max_adapters_in_batch", "max_adapter_rank") if k in args}
        return VLLMEngine(model_dir, **limits, options=args.get("vllm"))
    from serve.transformers_engine import TransformersEngine

    return TransformersEngine(model_dir, **{k: args[k] for k in ("max_adapter_bytes",) if k in args})


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
