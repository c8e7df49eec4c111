"""A base model's folder, and the forward pass of one packed micro-batch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from trainers import attention
from trainers.errors import ModelError
from trainers.loss import NLL, Objective, cross_entropy_sum
from trainers.noise import Noise

ARCHITECTURES = ("LlamaForCausalLM",)
"""What was tested end to end. A name that is not here is refused: a config file must not choose which code runs."""


def load(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", attn: str = attention.NAME) -> PreTrainedModel:
    """The model in `folder` (Hugging Face layout, safetensors only), in eval mode. Raises ModelError."""
    check(folder)
    disable_progress_bar()  # a worker's log is no terminal
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder.name} cannot be loaded: {str(error).splitlines()[0]}", "Check that the folder is complete.") from None
    return model.to(device).eval()  # type: ignore[arg-type]


def check(folder: Path) -> None:
    """Refuse what must not be loaded, before any of it is: remote code, unknown architectures, weights as pickles."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f"{folder} has no readable config.json.", "Name a Hugging Face model folder.", "model.base") from None
    if "auto_map" in config:
        raise ModelError(
            f"{folder.name} wants to run code of its own (`auto_map`).", "Use a model whose architecture transformers knows.", "model.base"
        )
    names = config.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise ModelError(f"{folder.name} is a {names[0]}.", f"Supported architectures: {', '.join(ARCHITECTURES)}.", "model.base")
    if "quantization_config" in config:
        raise ModelError(
            f"{folder.name} holds quantized weights.",
            "Name the unquantized base; `method: {type: qlora}` quantizes it itself.",
            "model.base",
        )
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder.name} holds no *.safetensors file.", "Convert its weights to safetensors.", "model.base")


def skeleton(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `folder` without values: all parameters on the meta device. Raises ModelError."""
    check(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False).eval()
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{folder.name} has a config.json that cannot be used: {str(error).splitlines()[0]}", "Check it.") from None


@dataclass(frozen=True)
class MicroBatch:
    """One packed row. Letters: T tokens, N supervised positions."""

    ids_1T: Tensor
    packing: attention.Packing
    source_N: Tensor
    """int64: positions whose hidden state predicts a supervised token (the one before it)."""
    target_N: Tensor
    """int64: the supervised tokens."""
    weight_N: Tensor
    """float32: their loss weights."""
    noise_T: Tensor | None = None
    """int32: the key of each token's random numbers; None for no noise."""

    @property
    def num_tokens(self) -> int:
        return self.ids_1T.shape[1]


@dataclass(frozen=True)
class Continue:
    """A few tokens of one sequence, after what the cache holds."""

    ids_1T: Tensor
    cache: DynamicCache


Example = tuple[np.ndarray, np.ndarray]
"""(ids int32[T], weights float32[T])."""


def collate(examples: list[Example], device: torch.device | str = "cpu", keys: list[np.ndarray] | None = None) -> MicroBatch:
    """Pack examples, with the noise keys of each where there is noise, into one row.

    No examples give a dummy row that weighs nothing and changes nothing.
    """
    if not examples:
        examples = [(np.zeros(2, dtype=np.int32), np.zeros(2, dtype=np.float32))]
        keys = None if keys is None else [np.zeros(2, dtype=np.int32)]
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i][0]))
    ids = np.concatenate([examples[i][0] for i in order]).astype(np.int64)
    weights = np.concatenate([examples[i][1] for i in order])
    target_at = np.flatnonzero(weights)
    return MicroBatch(
        ids_1T=_to(ids, device)[None],
        packing=attention.pack([len(examples[i][0]) for i in order], device),
        source_N=_to(target_at - 1, device),  # an example's first token never has weight, so this stays inside it
        target_N=_to(ids[target_at], device),
        weight_N=_to(weights[target_at].astype(np.float32), device),
        noise_T=None if keys is None else _to(np.concatenate([keys[i] for i in order]), device),
    )


def _to(values: np.ndarray, device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cuda":  # from pinned memory the copy runs beside the computation
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Trainee(nn.Module):
    """Body, supervised positions, chunked head and weighted loss sum in one forward: the root that sharding wraps."""

    def __init__(self, model: PreTrainedModel, objective: Objective = NLL, neftune_alpha: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.objective, self.neftune_alpha = objective, neftune_alpha
        self.tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]
        adapters = (m for m in model.modules() if isinstance(getattr(m, "noise", None), Noise))
        self.noise: Noise = getattr(next(adapters, None), "noise", None) or Noise()
        """What the layers of the model look at for their noise."""

    @property
    def body(self) -> Any:
        return self.model.get_decoder()

    @property
    def head_VE(self) -> Tensor:
        owner = self.model.get_input_embeddings() if self.tied else self.model.get_output_embeddings()
        return owner.weight  # type: ignore[union-attr, return-value]

    def forward(self, batch: MicroBatch | Continue) -> tuple[Tensor, Tensor] | Tensor:
        """Of a micro-batch: (weighted loss sum in nats, weighted count of right predictions). Of a `Continue`: logits of its last token."""
        if isinstance(batch, Continue):
            self.noise.keys_T = None
            hidden = self.body(batch.ids_1T, past_key_values=batch.cache, use_cache=True, packing=attention.Alone()).last_hidden_state
            return hidden[0, -1] @ self.head_VE.T
        self.noise.keys_T = batch.noise_T
        embedded_1TE = self.model.get_input_embeddings()(batch.ids_1T)
        if self.neftune_alpha and batch.noise_T is not None:
            embedded_1TE = embedded_1TE + self._neftune(embedded_1TE[0], batch.packing)[None]
        hidden_1TE = self.body(
            inputs_embeds=embedded_1TE, position_ids=batch.packing.position_ids, use_cache=False, packing=batch.packing
        ).last_hidden_state
        objective = self.objective if torch.is_grad_enabled() else NLL
        return cross_entropy_sum(hidden_1TE[0].index_select(0, batch.source_N), self.head_VE, batch.target_N, batch.weight_N, objective)

    def _neftune(self, embedded_TE: Tensor, packing: attention.Packing) -> Tensor:
        """Uniform noise of NEFTune, each token's scaled by its own example's length."""
        starts_T = packing.position_ids[0] == 0
        example_T = starts_T.cumsum(0) - 1
        lengths = torch.bincount(example_T)
        scale_T = self.neftune_alpha / (lengths[example_T] * embedded_TE.shape[1]).sqrt()
        return self.noise.uniform(embedded_TE, "embeddings") * scale_T[:, None].to(embedded_TE.dtype)


@torch.no_grad()
def greedy(trainee: Trainee, prompt_ids: np.ndarray, max_tokens: int, stop: frozenset[int], device: torch.device | str) -> list[int]:
    """The tokens that the model continues a prompt with, the most likely one each time; ends with a stop token or after `max_tokens`.

    The same number of forward passes on each worker of a sharded model: as all compute the same, all stop together.
    """
    cache = DynamicCache(config=trainee.model.config)
    ids = torch.from_numpy(prompt_ids.astype(np.int64)).to(device)
    answer: list[int] = []
    for _ in range(max_tokens):
        logits: Any = trainee(Continue(ids[None], cache))
        answer.append(int(logits.argmax()))
        if answer[-1] in stop:
            break
        ids = torch.tensor(answer[-1:], device=device)
    return answer
