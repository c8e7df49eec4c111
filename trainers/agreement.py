"""Whether a merged folder says what it should: its logits against those of base + adapter, or of a checkpoint's own weights.

A model is run with one block in memory: each block's weights are read in fp32 when its turn comes and let go after it, so that no model
is ever held whole, whatever its size. Base + adapter is computed by PEFT's own layers, so that no mistake of ours is on both sides.

Shape letters: B prompts, T tokens, E hidden size, N positions compared, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.errors import ModelError
from trainers.fold import EMBEDDING, HEAD, PREFIX
from trainers.tensors import ModelFolder, TensorFile

LONGEST = 256
"""Tokens of a prompt that are compared at most: its last ones."""
POSITIONS = 32
"""Positions of a prompt whose logits are compared: its last ones, where the answer stands."""
Read = Callable[[str], Tensor]
Bare = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Agreement:
    """How far two models are apart on some prompts, computed in fp32."""

    kl: float
    """Mean KL divergence of the next-token distributions, merged from what was trained, in nats per token."""
    effect: float
    """The same, base from what was trained: what the training itself did."""
    max_logit_difference: float

    @property
    def allowed(self) -> float:
        """The largest `kl` that is no loss worth a word."""
        return allowed(self.effect)


def allowed(effect: float) -> float:
    return 0.01 * effect + 5e-4


def compare(got_NV: Tensor, want_NV: Tensor, base_NV: Tensor, rounded: Callable[[], Tensor] | None = None) -> Agreement:
    """Hold the merged model's logits against those of what was trained; raises ModelError where they disagree.

    They agree below 1% of what training did, plus 5e-4: usual rounding of merged weights to the base's dtype measured 1.4e-4 nats in bf16
    where the adapter's own effect was 1.5, and a wrong scale is far above. After very little training, most of an adapter's changes are
    smaller than a bf16 step and rounding alone takes more (2% measured after two steps). Only then is `rounded` asked: the logits of what
    was trained with its weights rounded by others than us, with which the merged model must agree as closely.
    """
    found = Agreement(_kl(got_NV, want_NV), _kl(base_NV, want_NV), (got_NV - want_NV).abs().max().item())
    kl, allowed = found.kl, found.allowed
    if not kl <= allowed and rounded is not None:
        kl = _kl(got_NV, rounded())
    if not kl <= allowed:
        raise ModelError(
            f"The merged model does not agree with what was trained: KL {kl:.2g} nats, where {allowed:.2g} is allowed "
            f"(the training's own effect: {found.effect:.2g}).",
            "Set `export.merge` to false to go without it, and report this.",
        )
    return found


def of_weights(model_dir: Path, read: Read, prompts: list[list[int]]) -> Tensor:
    """Logits (N, V) of the model whose config lies in `model_dir` and whose weights `read` gives by name."""
    return _logits(_skeleton(model_dir), read, prompts)[0]


def of_adapter(model_dir: Path, adapter: Path, read: Read, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Logits (N, V) of base + adapter as PEFT computes them, and of the base alone; `read` gives the base's weights."""
    model, named = _with_adapter(model_dir, adapter, read)
    return _logits(model.base_model.model, named, prompts, model.disable_adapter)  # type: ignore[return-value, arg-type]


def of_rounded(model_dir: Path, adapter: Path, read: Read, prompts: list[list[int]], dtype: torch.dtype) -> Tensor:
    """Logits (N, V) of base + adapter merged by PEFT, its weights rounded to `dtype`."""
    from peft.tuners.lora import LoraLayer

    model, named = _with_adapter(model_dir, adapter, read)

    def merge(block: nn.Module) -> None:
        for layer in block.modules():
            if isinstance(layer, LoraLayer):
                layer.merge()  # type: ignore[operator]
                weight: Tensor = layer.base_layer.weight  # type: ignore[assignment, union-attr]
                weight.copy_(weight.to(dtype))

    def rounded(name: str) -> Tensor:
        return named(name) if "lora_" in name else named(name).to(dtype)

    return _logits(model.base_model.model, rounded, prompts, merge=merge)[0]


def _with_adapter(model_dir: Path, adapter: Path, read: Read) -> tuple[Any, Read]:
    """The model with PEFT's layers and without any weight, and where its weights come from."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # the merge handles a head that is no longer tied
        config = LoraConfig.from_pretrained(str(adapter))
        config.base_model_name_or_path = None  # whatever the base was called there
        model = get_peft_model(_skeleton(model_dir), config, low_cpu_mem_usage=True).eval()  # type: ignore[arg-type]
    file = TensorFile(adapter / "adapter_model.safetensors")

    def named(name: str) -> Tensor:
        """PEFT's name of a parameter -> its value, from the adapter's file or the base's."""
        own = name.replace(".modules_to_save.default", "").replace(".default.weight", ".weight").replace(".default", "")
        own = own.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        if ("lora_" in name or ".modules_to_save." in name) and PREFIX + own in file.entries:
            return file.read(PREFIX + own)
        return read(own.replace(".base_layer", "").replace(".original_module", ""))

    return model, named


def reader(folder: ModelFolder) -> Read:
    """Weights of a folder by name; a tied head is the embedding."""
    return lambda name: folder.read(EMBEDDING if name == HEAD and name not in folder else name)


def in_four_bits(read: Read, adapter: Path, double_quant: bool, dtype: torch.dtype) -> Read:
    """The base as QLoRA trains on it: bitsandbytes' own NF4 of every matrix that has an adapter, unpacked to `dtype`."""
    from bitsandbytes import functional

    entries = TensorFile(adapter / "adapter_model.safetensors").entries
    targets = {name.removeprefix(PREFIX).replace(".lora_A", "") for name in entries if ".lora_A." in name}

    def four_bits(name: str) -> Tensor:
        if name not in targets:
            return read(name)
        packed, state = functional.quantize_4bit(
            read(name).to(torch.bfloat16), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
        )
        state.dtype = dtype
        return functional.dequantize_4bit(packed, state)

    return four_bits


def _skeleton(model_dir: Path) -> nn.Module:
    """The model without any weight, on the meta device."""
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)  # its table lies in no file and must be computed
    return model.eval()


@torch.no_grad()
def _logits(
    model: Any, read: Read, prompts: list[list[int]], bare: Bare | None = None, merge: Callable[[nn.Module], None] | None = None
) -> tuple[Tensor, ...]:
    """Logits at the last positions of each prompt, fp32 (N, V); with `bare`, which disables the adapters for a while, also those without.
    `merge` is given each block when its weights are there.

    Both come from one pass, so that weights are read once. Rows are padded on the right, which no token before can see.
    """
    prompts = [ids[-LONGEST:] for ids in prompts]
    ids_BT = torch.zeros(len(prompts), max(len(ids) for ids in prompts), dtype=torch.long)
    for row, ids in zip(ids_BT, prompts, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    body, names = model.model, {module: name for name, module in model.named_modules()}
    bare_BTE: list[Tensor] = []  # the hidden states without adapters, at the block that comes next
    blocks = [_Block(block, names[block], read, bare, bare_BTE, merge) for block in (body.embed_tokens, *body.layers, body.norm)]
    try:
        hidden = [body(input_ids=ids_BT, use_cache=False).last_hidden_state, *bare_BTE]
    finally:
        for block in blocks:
            block.remove()
    kept = [torch.cat([h_TE[: len(ids)][-POSITIONS:] for h_TE, ids in zip(h_BTE, prompts, strict=True)]) for h_BTE in hidden]
    head_NE: list[Tensor] = kept[1:]
    block = _Block(model.lm_head, names[model.lm_head], read, bare, head_NE, merge)
    try:
        return model.lm_head(kept[0]), *head_NE
    finally:
        block.remove()


class _Block:
    """Reads a block's weights right before its forward pass and lets them go right after.

    With `bare`, the block is run a second time without its adapters, on `stream[0]` (at the first block: on the same input), which its
    output replaces.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        read: Read,
        bare: Bare | None,
        stream: list[Tensor],
        merge: Callable[[nn.Module], None] | None,
    ) -> None:
        self._block, self._name, self._read, self._bare, self._stream, self._merge = block, name, read, bare, stream, merge
        self._empty: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._hooks = [block.register_forward_pre_hook(self._fill), block.register_forward_hook(self._drop, with_kwargs=True)]

    def _fill(self, *_: Any) -> None:
        for inner, module in self._block.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    full = ".".join(part for part in (self._name, inner, name) if part)
                    self._empty.append((module, name, parameter))
                    module._parameters[name] = nn.Parameter(self._read(full).float(), requires_grad=False)
        if self._merge is not None:
            self._merge(self._block)

    def _drop(self, block: nn.Module, given: tuple[Any, ...], named: dict[str, Any], _: Any) -> None:
        if self._bare is not None:
            with self._bare():
                self._stream[:] = [block.forward(*(self._stream or given[:1]), *given[1:], **named)]
        self._clear()

    def _clear(self) -> None:
        for module, name, parameter in self._empty:
            module._parameters[name] = parameter
        self._empty = []

    def remove(self) -> None:
        self._clear()
        for hook in self._hooks:
            hook.remove()


def _kl(got_NV: Tensor, want_NV: Tensor) -> float:
    """Mean over N of KL(want || got)."""
    got_NV, want_NV = got_NV.log_softmax(-1), want_NV.log_softmax(-1)
    return nn.functional.kl_div(got_NV, want_NV, log_target=True, reduction="batchmean").item()
