"""A Hugging Face folder as one GGUF file, which llama.cpp, Ollama and LM Studio run: weights, tokenizer and chat template in one.

Names, order of rows and metadata are those that llama.cpp's own converter (convert_hf_to_gguf.py) writes. One tensor is in memory at a
time. What a GGUF file cannot say exactly is refused, never approximated: a tokenizer that splits text otherwise makes a silently worse
model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trainers.chat import Chat
from trainers.errors import ModelError
from trainers.tensors import ModelFolder

CHUNK = 2**22
"""Weights that are converted at once."""
INSTEAD = "Use the safetensors folder, which transformers and vLLM read."

_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([{**_BYTES, "use_regex": True}], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}], False),
    "llama-bpe": (
        [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
            {**_BYTES, "use_regex": False},
        ],
        True,
    ),
}
"""llama.cpp's name of a way to split text -> the steps of it in tokenizer.json, and whether a word that is a token needs no merges."""


def write_gguf(
    folder: Path,
    out: Path,
    kind: Literal["f16", "q8_0"],
    name: str,
    licence: str | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write `folder` as the GGUF file `out`; vectors stay fp32. Raises ModelError where GGUF cannot say what the folder says."""
    config, weights = _config(folder), ModelFolder(folder)
    quantum = Kind.F16 if kind == "f16" else Kind.Q8_0
    writer = gguf.GGUFWriter(out, "llama")
    try:
        writer.add_type("model")
        writer.add_name(name)
        if licence:
            writer.add_license(licence)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _describe(writer, config)
        _tokenizer(writer, folder, config.vocab_size)

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        kept = [n for n in weights.names() if not n.endswith(".inv_freq") and not (n == "lm_head.weight" and config.tie_word_embeddings)]
        for source in kept:
            target = names.get_name(source, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise ModelError(f"GGUF has no name for the tensor {source}.", INSTEAD)
            shape, held = weights[source].shape, _held(weights[source].shape, quantum)
            size = gguf.quant_shape_to_byte_shape(shape, held) if held == Kind.Q8_0 else shape
            dtype = np.dtype({Kind.F32: np.float32, Kind.F16: np.float16, Kind.Q8_0: np.uint8}[held])
            writer.add_tensor_info(target, size, dtype, int(np.prod(size)) * dtype.itemsize, held if held == Kind.Q8_0 else None)

        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        done, total = 0, sum(weights[n].num_bytes for n in kept)
        for source in kept:
            tensor = _permuted(weights.read(source), source, config)
            writer.write_tensor_data(_converted(tensor, _held(tuple(tensor.shape), quantum), source))
            done += weights[source].num_bytes
            on_progress(done, total)
    finally:
        writer.close()


def _config(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if config.model_type != "llama" or config.hidden_act != "silu":
        raise ModelError(f"GGUF export knows Llama models, and this is {config.model_type} with {config.hidden_act}.", INSTEAD)
    return config


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    """Shape and positions of the model."""
    rope = config.rope_parameters
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] not in ("default", "llama3"):  # llama3's lies in a tensor
        raise ModelError(f"GGUF export does not know positions of the kind {rope['rope_type']}.", INSTEAD)


def _rope_factors(config: Any) -> np.ndarray | None:
    """Llama 3's stretched positions: what each frequency is divided by, fp32 (head_dim / 2,)."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    return (plain / stretched).numpy()


def _tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    chat = Chat.load(folder)
    told = json.loads(chat.tokenizer_json)
    model, special = told["model"], json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {t["id"]: t for t in told["added_tokens"]}
    words = {**{id: text for text, id in model["vocab"].items()}, **{id: t["content"] for id, t in added.items()}}
    if max(words) >= vocab_size:
        raise ModelError(f"The tokenizer has {max(words) + 1} tokens, and the model {vocab_size}.", "Mend the folder.")

    def kind(id: int) -> gguf.TokenType:
        """Only control tokens are read as such: other special strings are plain text to Tuneyard, in training and here."""
        if id not in words:
            return gguf.TokenType.UNUSED
        if id not in added or (added[id]["special"] and added[id]["content"] not in chat.control):
            return gguf.TokenType.NORMAL
        return gguf.TokenType.CONTROL if added[id]["special"] else gguf.TokenType.USER_DEFINED

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(told))
    writer.add_token_list([words.get(id, f"[PAD{id}]") for id in range(vocab_size)])
    writer.add_token_types([kind(id) for id in range(vocab_size)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    ids = {text: id for id, text in words.items()}
    for key, add in {
        "bos_token": writer.add_bos_token_id,
        "eos_token": writer.add_eos_token_id,
        "unk_token": writer.add_unk_token_id,
        "pad_token": writer.add_pad_token_id,
    }.items():
        value = special.get(key)
        text = value["content"] if isinstance(value, dict) else value
        if text in ids:
            add(ids[text])
    writer.add_uint32("tokenizer.ggml.eot_token_id", chat.control[chat.end_of_turn])
    start = chat.tokenizer.encode("").ids
    writer.add_add_bos_token(bool(start) and words[start[0]] == special.get("bos_token"))
    writer.add_chat_template(chat.template)


def _pre_tokenizer(told: dict[str, Any]) -> str:
    """llama.cpp's name of how this tokenizer.json splits text. Raises ModelError where it has none."""
    model, steps = told["model"], told.get("pre_tokenizer") or {}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ModelError("GGUF export knows byte-level BPE tokenizers, and this is a SentencePiece one or another kind.", INSTEAD)
    if told.get("normalizer") is not None:
        raise ModelError(f"This tokenizer changes text before it reads it ({told['normalizer']['type']}), which GGUF cannot say.", INSTEAD)
    found = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    for name, (known, whole_words) in PRE_TOKENIZERS.items():
        same = len(known) == len(found) and all(k.items() <= f.items() for k, f in zip(known, found, strict=True))
        if same and bool(model.get("ignore_merges")) == whole_words:
            return name
    raise ModelError("This tokenizer splits text in a way that llama.cpp has no name for.", INSTEAD)


def _held(shape: tuple[int, ...], quantum: Kind) -> Kind:
    """How a tensor is kept: vectors in fp32; a row that is no whole number of blocks in f16."""
    if len(shape) == 1:
        return Kind.F32
    return Kind.F16 if quantum == Kind.Q8_0 and shape[-1] % 32 else quantum


def _permuted(tensor: Tensor, name: str, config: Any) -> Tensor:
    """A head's rows in llama.cpp's order: it turns neighbouring pairs of them together, Hugging Face one of each half."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _converted(tensor: Tensor, kind: Kind, name: str) -> np.ndarray:
    """A tensor as it lies in the file. Raises ModelError for what 16 bits cannot hold."""
    if kind == Kind.F32:
        return tensor.float().numpy()
    parts = []
    for rows in _chunks(tensor):
        if kind == Kind.F16:
            part = rows.half()
            if not part.isfinite().all():
                raise ModelError(f"{name} holds numbers beyond {torch.finfo(torch.float16).max:g}, the largest of f16.", INSTEAD)
            parts.append(part.numpy())
        else:
            parts.append(gguf.quants.quantize(rows.float().numpy(), kind))
    return np.concatenate(parts)


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(max(1, CHUNK // tensor.shape[-1]))
