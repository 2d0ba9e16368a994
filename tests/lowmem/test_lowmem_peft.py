"""LoRA on the frozen layers, as PEFT sees it: files, swapping, merging, mixed batches."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from tests.lowmem.wrapped import config, randomise
from tests.tiny import tiny_model
from xfactor_peft.base.loading import switch_off_dropout
from xfactor_peft.lowmem import int8_matmul
from xfactor_peft.lowmem.int8 import Int8Linear
from xfactor_peft.lowmem.nf4 import NF4Linear
from xfactor_peft.lowmem.peft_layers import FusedLoraLinear, QuantizedLoraLinear, custom_modules
from xfactor_peft.lowmem.streaming import load_streaming

QUANTIZATIONS = [None, "int8", "nf4"]
IDS = torch.arange(24).view(2, 12)


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with an nn.Linear for every quantised layer."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear | NF4Linear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight.data = module.dequantize()
            plain.bias = module.bias
            model.set_submodule(name, plain)
    return model


@pytest.fixture
def load(tiny_folders):
    def load(kind="gpt2", quantization=None):
        model = load_streaming(tiny_folders[kind], dtype=torch.float32, quantization=quantization)
        switch_off_dropout(model)
        return model

    return load


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def close(actual, expected, tolerance: float) -> None:
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.fixture
def exact_int8(monkeypatch):
    """Int8 weights, but products in floating point: what is left is equal up to rounding."""
    monkeypatch.setattr(int8_matmul, "MODE", "off")


def train_once(model) -> torch.Tensor:
    """The logits of a model with random adapters and, in every adapter parameter, the gradients of one step."""
    randomise(model)
    output = model.train()(IDS).logits
    output.logsumexp(-1).sum().backward()
    return output.detach()


def adapter_gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_" in n])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_and_gradients_are_those_of_peft_on_the_same_weights(load, kind, quantization, exact_int8):
    base = load(kind, quantization)
    theirs = get_peft_model(dequantized(base), config(kind, ours=False))
    ours = get_peft_model(base, config(kind))
    kinds = {type(m) for m in ours.modules() if isinstance(m, FusedLoraLinear)}
    assert kinds == {QuantizedLoraLinear if quantization else FusedLoraLinear}
    close(train_once(ours), train_once(theirs), 1e-4)
    close(adapter_gradients(ours), adapter_gradients(theirs), 1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_int8_products_stay_close_on_a_whole_model(load, kind):
    """Two layers of width 64 with peaked predictions: the worst case for rounding x and its gradient to int8."""
    base = load(kind, "int8")
    theirs = get_peft_model(dequantized(base), config(kind, ours=False))
    ours = get_peft_model(base, config(kind))
    close(train_once(ours), train_once(theirs), 0.06)
    assert torch.cosine_similarity(adapter_gradients(ours), adapter_gradients(theirs), dim=0) > 0.9


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_new_adapter_is_the_base(load, quantization):
    base = load("gpt2", quantization)
    before = logits(base)
    assert torch.equal(logits(get_peft_model(base, config())), before)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_files_are_plain_peft(load, kind, quantization, tmp_path):
    """Trained here, loaded by plain PEFT on the plain model, and the other way round."""
    ours = get_peft_model(load(kind, quantization), config(kind))
    randomise(ours)
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    theirs = get_peft_model(tiny_model(kind), config(kind, ours=False))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)

    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    settings = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    assert settings[0]["fan_in_fan_out"] == settings[1]["fan_in_fan_out"] == (kind == "gpt2")

    plain = PeftModel.from_pretrained(tiny_model(kind), tmp_path / "ours")
    assert torch.equal(logits(plain), logits(theirs.eval()))
    here = PeftModel.from_pretrained(load(kind, quantization), tmp_path / "theirs", config=config(kind))
    assert torch.equal(logits(here), logits(ours.eval()))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_swapping_there_and_back_is_exact(load, quantization):
    model = get_peft_model(load("gpt2", quantization), config(), adapter_name="a")
    model.add_adapter("b", config())
    randomise(model)
    first = logits(model)
    model.set_adapter("b")
    other = logits(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), first)
    assert not torch.allclose(other, first)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_disabled_adapter_is_the_base(load, quantization):
    base = load("gpt2", quantization)
    before = logits(base)
    model = get_peft_model(base, config())
    randomise(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before)
    assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_two_active_adapters_add_up(load, quantization, exact_int8):
    base = load("gpt2", quantization)
    theirs = get_peft_model(dequantized(base), config(ours=False), adapter_name="a")
    ours = get_peft_model(base, config(), adapter_name="a")
    for model in (ours, theirs):
        model.add_adapter("b", config(ours=model is ours))
        model.base_model.set_adapter(["a", "b"])
    close(train_once(ours), train_once(theirs), 1e-4)
    layer = "base_model.model.transformer.h.1.mlp.c_proj"
    for side in ("lora_A", "lora_B"):
        for name in "ab":
            mine, other = (getattr(m.get_submodule(layer), side)[name].weight.grad for m in (ours, theirs))
            close(mine, other, 1e-3)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_merging_and_unmerging(load, quantization):
    model = get_peft_model(load("gpt2", quantization), config()).eval()
    randomise(model)
    unmerged = logits(model)
    model.merge_adapter(safe_merge=True)
    tolerance = {None: 1e-4, "int8": 0.1, "nf4": 0.7}[quantization]
    close(logits(model), unmerged, tolerance)
    model.unmerge_adapter()
    if quantization is None:
        close(logits(model), unmerged, 1e-4)  # PEFT subtracts what it added
    else:
        assert torch.equal(logits(model), unmerged)  # the codes from before are put back
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    close(logits(merged), unmerged, tolerance)


def test_a_merge_of_what_is_not_finite_changes_nothing(load):
    model = get_peft_model(load("gpt2", "int8"), config())
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLoraLinear))
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_batch_of_different_adapters(load, quantization):
    model = get_peft_model(load("gpt2", quantization), config(), adapter_name="a")
    model.add_adapter("b", config())
    randomise(model)
    model.eval()
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["a", "__base__"]).logits
        model.set_adapter("a")
        close(mixed[:1], model(IDS[:1]).logits, 0.02)
        with model.disable_adapter():
            close(mixed[1:], model(IDS[1:]).logits, 0.02)


def test_dropout_trains_and_is_off_in_evaluation(load):
    model = get_peft_model(load("gpt2", "int8"), config(lora_dropout=0.5))
    randomise(model)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model(IDS).logits.sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_" in n)
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_lora_bias(load):
    base = load("gpt2", "nf4")
    theirs = get_peft_model(dequantized(base), config(ours=False, lora_bias=True))
    ours = get_peft_model(base, config(lora_bias=True))
    for model in (ours, theirs):
        randomise(model)
        model.eval()
    close(logits(ours), logits(theirs), 1e-4)
    ours.merge_adapter()
    close(logits(ours), logits(theirs), 0.7)


def test_variants_go_to_peft_or_say_that_they_cannot(load):
    model = get_peft_model(load("gpt2"), config(use_dora=True))
    assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())
    with pytest.raises(ValueError, match="plain LoRA only, not use_dora"):
        get_peft_model(load("gpt2", "int8"), config(use_dora=True))


def test_a_base_weight_that_trains_gets_its_gradient(load):
    model = get_peft_model(load("gpt2"), config())
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    layer.base_layer.weight.requires_grad_(True)
    model(IDS).logits.sum().backward()
    assert layer.base_layer.weight.grad.abs().sum() > 0


def test_layers_of_bitsandbytes_stay_with_peft():
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False))
    made = LoraConfig(r=2, target_modules=["0"])
    made._register_custom_module(custom_modules())
    model = get_peft_model(base, made)
    assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())
