"""QLoRA beside PEFT on a bitsandbytes base: the same logits and gradients from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.numerics.runs import make_spec, random_examples
from trainers import model, nf4, qlora
from trainers.errors import ModelError
from trainers.learner import Learner
from trainers.noise import Noise, token_keys
from trainers.parallel import World
from trainers.qlora import QLoraLinear
from trainers.spec import JobSpec, QLora


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with bf16 weights: those that are packed, whoever loads it and how."""
    folder = tmp_path_factory.mktemp("bf16") / "tiny-llama"
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def make_layer(shape: tuple[int, int] = (48, 80), bias: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> QLoraLinear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    layer = QLoraLinear(linear, "layer", QLora(r=4, alpha=8, **options), Noise())
    layer.take_weight(torch.randn(shape, generator=generator) * 0.05)
    for parameter in (layer.lora_A, layer.lora_B):
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return layer.requires_grad_(True)


def spec_of(**method: Any) -> JobSpec:
    return make_spec(
        method={"type": "qlora", "r": 4, "alpha": 8, **method},
        scale={"precision": "fp32", "sharding": "none", "activation_checkpointing": "none"},
    )


def trained(folder: Path, spec: JobSpec) -> Learner:
    """A learner whose adapters are away from their zero start."""
    learner = Learner.build(spec, folder, World())
    generator = torch.Generator().manual_seed(2)
    for name, parameter in learner.parameters.items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.05, generator=generator)
    return learner


def peer_of(folder: Path, adapter: Path, dtype: torch.dtype, double_quant: bool = True) -> Any:
    """The same base in four bits by transformers and bitsandbytes, with our adapter loaded by PEFT."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=dtype
    )
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"})
    peer = PeftModel.from_pretrained(bare, str(adapter), is_trainable=True)
    assert any(isinstance(m, Linear4bit) for m in peer.modules())
    return peer.train()  # its path for inference on a CPU takes other weights: scales rounded to bf16


def beside_peft(folder: Path, spec: JobSpec, dtype: torch.dtype, scratch: Path, vocab: int, length: int) -> dict[str, float]:
    """Relative differences of logits, and of the gradient of one step, ours beside PEFT's."""
    learner = trained(folder, spec)
    assert isinstance(spec.method, QLora)
    qlora.export(learner.learned(), spec.method, folder.name, scratch / "adapter")
    peer = peer_of(folder, scratch / "adapter", dtype, spec.method.double_quant)

    ids, weights = random_examples(np.random.default_rng(3), 1, vocab, length)[0]
    learner.zero()
    loss: Any = learner.trainee(model.collate([(ids, weights)]))[0]
    loss.backward()
    ids_1T = torch.from_numpy(ids.astype(np.int64))[None]
    logits_TV = peer(input_ids=ids_1T, use_cache=False).logits[0]
    targets = torch.where(torch.from_numpy(weights) > 0, ids_1T[0], -100)
    F.cross_entropy(logits_TV[:-1].float(), targets[1:], reduction="sum").backward()
    with torch.no_grad():
        ours_V = last_logits(learner.trainee, ids_1T)
    theirs = {n: p.grad for n, p in peer.named_parameters() if p.grad is not None}
    names = {n: f"base_model.model.{n}.default.weight" for n in learner.parameters}
    assert set(names.values()) == theirs.keys()
    ours_all = torch.cat([p.grad.flatten().double() for p in learner.parameters.values() if p.grad is not None])
    theirs_all = torch.cat([theirs[names[n]].flatten().double() for n in learner.parameters])  # type: ignore[union-attr]
    return {
        "logits": float((ours_V - logits_TV[-1].detach()).norm() / ours_V.norm()),
        "gradient": float((ours_all - theirs_all).norm() / theirs_all.norm()),
    }


def last_logits(trainee: model.Trainee, ids_1T: Tensor) -> Tensor:
    from transformers import DynamicCache

    out: Any = trainee(model.Continue(ids_1T, DynamicCache(config=trainee.model.config)))
    return out


@pytest.mark.parametrize("double_quant", [True, False])
def test_peft_and_bitsandbytes_compute_the_same(base: Path, tmp_path: Path, double_quant: bool) -> None:
    off = beside_peft(base, spec_of(double_quant=double_quant, rslora=double_quant), torch.float32, tmp_path, 300, 40)
    assert off["logits"] <= 1e-6 and off["gradient"] <= 2e-6, off


def test_layer_equals_plain_autograd() -> None:
    """In fp64, where nothing hides: against y = x W^T + bias + s (x A^T) B^T written out."""
    for bias in (False, True):
        layer = make_layer(bias=bias, dtype=torch.float64, rslora=True)
        x = torch.randn(2, 5, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        weight = torch.randn(2, 5, 48, dtype=torch.float64)
        leaves = [x, layer.lora_A, layer.lora_B]
        got_out = layer(x)
        got = torch.autograd.grad((got_out * weight).sum(), leaves)
        w_OI = nf4.dequantize(layer.packed, layer.shape, torch.float64)
        want_out = F.linear(x, w_OI, layer.bias) + 4.0 * x @ layer.lora_A.T @ layer.lora_B.T
        want = torch.autograd.grad((want_out * weight).sum(), leaves)
        torch.testing.assert_close(got_out, want_out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_dropout_touches_the_adapter_alone() -> None:
    layer = make_layer(dropout=0.4)
    x = torch.randn(6, 80, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.equal(layer(x), make_layer()(x))  # outside of training there is no noise
    layer.noise.keys_T = torch.from_numpy(token_keys(0, 1, 2, 6))
    noise: Any = layer.noise
    dropped = noise.dropout(x, layer)
    w_OI = nf4.dequantize(layer.packed, layer.shape, torch.float32)
    want = x @ w_OI.T + 2.0 * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), want)
    leaves = [x, layer.lora_A, layer.lora_B]
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    layer = make_layer((512, 640))
    x = torch.randn(3, 640).to(dtype).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert kept and not any(t.is_floating_point() and t.numel() >= 512 * 640 // 64 for t in kept)
    assert not any(p.requires_grad for p in layer.parameters() if p.numel() >= 512 * 640)
    assert layer.state_dict().keys() == {"lora_A", "lora_B"}


def test_builds_from_the_files_alone(base: Path) -> None:
    """Structure on the meta device, weights packed as they arrive, adapters like LoRA's."""
    learner = Learner.build(spec_of(), base, World())
    layer = learner.trainee.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, QLoraLinear)
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(nf4.dequantize(layer.packed, layer.shape, torch.bfloat16), nf4.round_trip(source))
    assert {n.rpartition(".")[2] for n in learner.parameters} == {"lora_A", "lora_B"}
    lora = Learner.build(make_spec(method={"type": "lora", "r": 4, "alpha": 8}, scale=spec_of().scale.model_dump()), base, World())
    assert lora.parameters.keys() == learner.parameters.keys()
    assert all(torch.equal(p, lora.parameters[n]) for n, p in learner.parameters.items())
    assert "LoRA adapters of rank 4 on 14 layers" in learner.line() and "in 4.13 bits each" in learner.line()
    with pytest.raises(ModelError, match=r"q_proj\.weight` is \(3, 4\)"):
        layer.take_weight(torch.zeros(3, 4))


def test_of_a_loaded_model(base: Path) -> None:
    bare = model.load(base, torch.float32)
    weight = bare.get_parameter("model.layers.1.mlp.up_proj.weight").detach().clone()
    qlora.apply(bare, QLora(targets=["up_proj"]))
    layer = bare.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, QLoraLinear)
    assert torch.equal(nf4.dequantize(layer.packed, layer.shape, torch.float32), nf4.round_trip(weight, dtype=torch.float32))
    assert isinstance(bare.get_submodule("model.layers.1.mlp.down_proj"), nn.Linear)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch warns of what its own compiler does
def test_compiles_in_one_graph() -> None:
    """Traced forward and backward without a break, as blocks are on GPUs."""
    layer = make_layer()
    x = torch.randn(4, 80, requires_grad=True)
    layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaves = [x, layer.lora_A, layer.lora_B]
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).square().sum(), leaves), torch.autograd.grad(layer(x).square().sum(), leaves)
    )
