"""Exports: a GGUF file says what the folder says, to gguf's own reader, to transformers and token for token; adapters load in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainers import tuned
from trainers import export, gguf_file, merge
from trainers.chat import Chat
from trainers.errors import ModelError, UserError
from trainers.gguf_file import write_gguf
from trainers.records import ModelRecord
from trainers.tensors import ModelFolder


def from_gguf(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_every_tensor_is_the_folders(tiny: Path, tmp_path: Path, kind: Literal["f16", "q8_0"], tied: bool) -> None:
    base = tuned.resaved(tiny, tmp_path / "base", tied=tied, dtype=torch.bfloat16, shard="20KB")
    path = tmp_path / "m.gguf"
    told: list[tuple[int, int]] = []
    write_gguf(base, path, kind, "tiny", "mit", lambda done, total: told.append((done, total)))
    weights, config = ModelFolder(base), json.loads((base / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert len(found) == len(weights.names()) == 20 + (not tied)
    for source in weights.names():
        tensor = found[str(names.get_name(source, try_suffixes=(".weight",)))]
        want = weights.read(source).float().numpy()
        got = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(want.shape)
        if (part := tensor.name.split(".")[-2]) in heads:  # llama.cpp's order of a head's rows, undone
            got = got.reshape(heads[part], -1, 2, want.shape[1]).swapaxes(1, 2).reshape(want.shape)
        if want.ndim == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and (got == want).all()
        elif kind == "f16":
            assert (got == want.astype(np.float16)).all()
        else:  # half a step of the block's scale, which is itself held in f16
            blocks = abs(want).reshape(-1, 32).max(1, keepdims=True)
            assert (abs(got - want).reshape(-1, 32) <= blocks / 127 * 0.5 + blocks * 2**-10).all()
    assert told[-1][0] == told[-1][1] == sum(weights[n].num_bytes for n in weights.names())


def test_transformers_reads_the_same_model(tiny: Path, tmp_path: Path) -> None:
    want = tuned.logits(tuned.load(tiny))
    write_gguf(tiny, tmp_path / "f16.gguf", "f16", "tiny")
    model = from_gguf(tmp_path / "f16.gguf")
    assert (tuned.logits(model) - want).abs().max() < 0.02 * want.abs().max()
    write_gguf(tiny, tmp_path / "q8.gguf", "q8_0", "tiny")
    assert (tuned.logits(from_gguf(tmp_path / "q8.gguf")) - want).abs().max() < 0.1 * want.abs().max()
    tokenizer, chat = AutoTokenizer.from_pretrained(tmp_path, gguf_file="f16.gguf"), Chat.load(tiny)
    said = [{"role": "user", "content": "the quick brown Fox: 1234 über <filename>\n\n  jumps"}]  # <filename> is plain text to both
    assert tokenizer(chat.render(said, True), add_special_tokens=False)["input_ids"] == chat.prompt(said)
    assert tokenizer.chat_template == chat.template


def test_the_real_model(smollm: Path, tmp_path: Path) -> None:
    """By hand, transformers' logits of it (20 s) are the folder's to 1e-3, and llama.cpp's answers are the folder's."""
    path = tmp_path / "smollm.gguf"
    write_gguf(smollm, path, "f16", "smollm", "apache-2.0")
    reader = gguf.GGUFReader(path)
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.architecture"] == "llama" and told["general.license"] == "apache-2.0" and told["general.file_type"] == 1
    assert told["tokenizer.ggml.pre"] == "smollm" and told["tokenizer.ggml.model"] == "gpt2"
    assert told["tokenizer.ggml.bos_token_id"] == 1 and told["tokenizer.ggml.eos_token_id"] == 2 == told["tokenizer.ggml.eot_token_id"]
    assert told["tokenizer.ggml.add_bos_token"] is False
    assert told["llama.rope.freq_base"] == 100000 and told["llama.context_length"] == 8192
    chat = Chat.load(smollm)
    assert told["tokenizer.chat_template"] == chat.template and len(told["tokenizer.ggml.tokens"]) == 49152
    types = dict(zip(told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"], strict=True))
    assert types["<|im_end|>"] == gguf.TokenType.CONTROL and types["<filename>"] == gguf.TokenType.NORMAL
    assert len(told["tokenizer.ggml.merges"]) == len(json.loads(chat.tokenizer_json)["model"]["merges"])


def test_llama_3s_positions_lie_in_a_tensor(tiny: Path, tmp_path: Path) -> None:
    base = tuned.resaved(tiny, tmp_path / "base")
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = json.loads((base / "config.json").read_text())
    config |= {"head_dim": 8, "rope_parameters": {**rope, "original_max_position_embeddings": 64}}
    (base / "config.json").write_text(json.dumps(config))
    write_gguf(base, tmp_path / "m.gguf", "f16", "tiny")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensor = next(t for t in reader.tensors if t.name == "rope_freqs.weight")
    # The rule of the Llama 3.1 release: long waves are stretched by the factor, short ones are not, and between the two it slides.
    want = []
    for i in range(4):
        wave = 2 * np.pi * 500000.0 ** (i / 4)
        slide = (64 / wave - 1) / (4 - 1)
        want.append(1 if wave < 64 / 4 else 8 if wave > 64 else 1 / ((1 - slide) / 8 + slide))
    assert want[0] == 1 and want[-1] == 8 and np.allclose(tensor.data, want, rtol=1e-5)
    assert reader.fields["llama.rope.freq_base"].contents() == 500000


def tokenizer_json(steps: list[Any], **model: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) != 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return json.loads(tokenizer.to_str())


def test_how_text_is_split_is_named_or_refused() -> None:
    name = gguf_file._pre_tokenizer
    whole, bare = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3 = pre_tokenizers.Split(Pattern(gguf_file._LLAMA3_SPLIT), "isolated")
    assert name(tokenizer_json([whole])) == "gpt-2"
    assert name(tokenizer_json([pre_tokenizers.Digits(individual_digits=True), whole])) == "smollm"
    assert name(tokenizer_json([llama3, bare], ignore_merges=True)) == "llama-bpe"
    for steps, model in (
        ([llama3, bare], {}),
        ([pre_tokenizers.Digits(individual_digits=False), whole], {}),
        ([pre_tokenizers.Split(Pattern(r"\d"), "isolated"), bare], {"ignore_merges": True}),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], {}),
    ):
        with pytest.raises(ModelError, match="splits text"):
            name(tokenizer_json(steps, **model))
    with pytest.raises(ModelError, match="SentencePiece"):
        name(tokenizer_json([pre_tokenizers.Metaspace()], byte_fallback=True))
    told = tokenizer_json([whole])
    told["normalizer"] = json.loads(normalizers.NFC().__getstate__())
    with pytest.raises(ModelError, match="NFC"):
        name(told)


def test_what_gguf_cannot_say_is_refused(tiny: Path, tmp_path: Path) -> None:
    base = tuned.resaved(tiny, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for change, said in (
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"vocab_size": 299}, "300 tokens, and the model 299"),
    ):
        (base / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=said):
            write_gguf(base, tmp_path / "m.gguf", "f16", "tiny")
    model = tuned.load(tiny)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = 1e6
    model.save_pretrained(str(base))
    with pytest.raises(ModelError, match=r"up_proj\.weight holds numbers beyond 65504"):
        write_gguf(base, tmp_path / "m.gguf", "f16", "tiny")
    write_gguf(base, tmp_path / "m.gguf", "q8_0", "tiny")  # its scales reach further


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "norm whole": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_exported_adapter_loads_in_peft(tiny: Path, tmp_path: Path, kind: str) -> None:
    run = tuned.a_run(tmp_path / "run", tiny, **ADAPTERS[kind])
    record = merge.merge(run, tuned.job(export={"merge": False}), "tiny", tiny, 10, tuned.PROMPTS)
    export.export(run, record, "adapter", tmp_path / "out" / "adapter")
    got = tuned.logits(PeftModel.from_pretrained(tuned.load(tiny), str(tmp_path / "out" / "adapter")).eval())
    assert got.equal(tuned.reference(tiny, run.path("adapters", "step-000010")))


def test_exports_of_a_job(tiny: Path, tmp_path: Path) -> None:
    run = tuned.a_run(tmp_path / "run", tiny)
    spec = tuned.job(name="mine", export={"formats": ["safetensors", "gguf-f16", "gguf-q8_0"]})
    record = export.export_all(run, spec, merge.merge(run, spec, "tiny", tiny, 10, tuned.PROMPTS))
    assert record.exports == {"gguf-f16": "exports/mine-f16.gguf", "gguf-q8_0": "exports/mine-q8_0.gguf"}
    assert run.read("model.json", ModelRecord) == record
    model = from_gguf(run.path("exports", "mine-f16.gguf"))
    want = tuned.logits(tuned.load(run.path("model")))
    assert (tuned.logits(model) - want).abs().max() < 0.02 * want.abs().max()
    stamp = run.path("exports", "mine-f16.gguf").stat().st_mtime_ns
    assert export.export_all(run, spec, record) == record  # done is done
    assert run.path("exports", "mine-f16.gguf").stat().st_mtime_ns == stamp
    # Another step's model: the files of the one before are no longer its forms.
    run.path("adapters", "step-000010").rename(run.path("adapters", "step-000020"))
    assert merge.merge(run, spec, "tiny", tiny, 20, tuned.PROMPTS).exports == {} and not run.path("exports").exists()


def test_a_failed_export_is_an_event(tiny: Path, tmp_path: Path) -> None:
    run = tuned.a_run(tmp_path / "run", tiny)
    spec = tuned.job(export={"formats": ["gguf-f16", "gguf-q8_0"]})
    record = merge.merge(run, spec, "tiny", tiny, 10, tuned.PROMPTS)
    config = json.loads(run.path("model", "config.json").read_text())
    run.path("model", "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    assert export.export_all(run, spec, record) == record
    events = [e for _, found in run.events() for e in found]
    assert [e.level for e in events] == ["error", "error"] and "Export as gguf-f16 failed: GGUF export knows" in events[0].message
    assert not list(run.path("exports").iterdir())  # nothing half-written


def test_what_cannot_be_exported(tiny: Path, tmp_path: Path) -> None:
    run = tuned.a_run(tmp_path / "run", tiny)
    record = merge.merge(run, tuned.job(export={"merge": False}), "tiny", tiny, 10, tuned.PROMPTS)
    with pytest.raises(UserError, match="no merged model"):
        export.export(run, record, "gguf-f16", tmp_path / "m.gguf")
    with pytest.raises(UserError, match="it has no adapter"):
        export.export(run, record.model_copy(update={"adapter": None}), "adapter", tmp_path / "a")
    with pytest.raises(UserError, match="is there already"):
        export.export(run, record, "adapter", tiny)
    export.export(run, record, "adapter", tmp_path / "a")
    with pytest.raises(UserError, match="cannot be written"):
        export.export(run, record, "adapter", tmp_path / "a" / "README.md" / "x")
    assert not list(tmp_path.glob(".*"))
