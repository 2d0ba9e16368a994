"""Smaller activations change neither the model nor its gradients."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.activations import NewGELUActivation

from tests.lowmem.layers import error, saved_bytes
from tests.lowmem.wrapped import config, randomise
from tests.tiny import KINDS, tiny_model
from xfactor_peft.base.loading import switch_off_dropout
from xfactor_peft.lowmem.activations import TanhGELU, checkpointed_blocks, prepare_for_training
from xfactor_peft.lowmem.attention import LONGEST, NAME, ShortAttention
from xfactor_peft.lowmem.imports import allow_bitsandbytes, leave_out_bitsandbytes
from xfactor_peft.lowmem.streaming import load_streaming

IDS = torch.arange(48).view(2, 24)
SUFFIXES = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "opt": ["q_proj", "fc2"],
}


def with_lora(kind: str) -> nn.Module:
    model = get_peft_model(tiny_model(kind), LoraConfig(r=2, target_modules=SUFFIXES[kind], task_type="CAUSAL_LM"))
    randomise(model)
    return model.train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS).logits.logsumexp(-1).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_gelu_is_the_same_function_and_saves_one_tensor():
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(TanhGELU()(x), NewGELUActivation()(x))
    narrow = x.detach().bfloat16().requires_grad_()
    exact = TanhGELU()(x)
    assert error(TanhGELU()(narrow).double(), exact) <= error(NewGELUActivation()(narrow).double(), exact)
    assert saved_bytes(lambda: TanhGELU()(narrow)) == narrow.nbytes
    assert saved_bytes(lambda: NewGELUActivation()(narrow)) >= 4 * narrow.nbytes  # negative control


def test_gelu_is_replaced():
    model = tiny_model("gpt2")
    prepare_for_training(model)
    assert not any(isinstance(m, NewGELUActivation) for m in model.modules())
    assert sum(isinstance(m, TanhGELU) for m in model.modules()) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True, 1])
def test_preparing_changes_no_gradient(kind, checkpointing):
    model = with_lora(kind)
    switch_off_dropout(model)
    before = gradients(model)
    logits = model(IDS).logits
    prepare_for_training(model, checkpointing=checkpointing)
    torch.testing.assert_close(model(IDS).logits, logits)
    after = gradients(model)
    assert before.keys() == after.keys()
    assert all(g.abs().sum() > 0 for g in after.values())
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-4 * float(before[name].abs().max()))


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_checkpointing_with_the_frozen_layers(tiny_folders, quantization):
    model = load_streaming(tiny_folders["gpt2"], dtype=torch.bfloat16, quantization=quantization)
    switch_off_dropout(model)
    model = get_peft_model(model, config())
    randomise(model)
    model.train()
    prepare_for_training(model)
    without, kept = gradients(model), saved_bytes(lambda: model(IDS))
    prepare_for_training(model, checkpointing=True)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, without[name]), name
    assert saved_bytes(lambda: model(IDS)) < kept / 2
    prepare_for_training(model, checkpointing=False)
    assert saved_bytes(lambda: model(IDS)) == kept


def test_some_blocks():
    model = tiny_model("gpt2")
    blocks = checkpointed_blocks(model)
    prepare_for_training(model, checkpointing=1)
    assert [block.gradient_checkpointing for block in blocks] == [True, False]
    prepare_for_training(model, checkpointing=True)
    assert all(block.gradient_checkpointing for block in blocks)


def test_a_model_without_blocks_says_so():
    class Bare(nn.Module):
        config = type("Config", (), {"_attn_implementation": "eager"})()

    with pytest.raises(ValueError, match="`checkpointing=off`"):
        prepare_for_training(Bare(), checkpointing=True)


def attention_inputs(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, length, 3, 8)  # strided as a model's projections are
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]


def test_attention_gradcheck():
    assert torch.autograd.gradcheck(ShortAttention.apply, (*attention_inputs(7, torch.float64), 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 13, 64])
def test_attention_error_is_no_larger_than_that_of_torch(dtype, length, monkeypatch):
    monkeypatch.setattr("xfactor_peft.lowmem.attention.GROUP_BYTES", 4 * length * length * 2)  # two heads at a time

    def run(function, inputs):
        y = function(*inputs)
        grads = torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
        return [x.double() for x in (y, *grads)]

    def torch_attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    values = attention_inputs(length, dtype)
    truth = run(torch_attention, [x.detach().double().requires_grad_() for x in values])
    ours = run(lambda q, k, v: ShortAttention.apply(q, k, v, None), values)
    theirs = run(torch_attention, values)
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        if exact.norm() > 1e-9:
            assert error(mine, exact) <= error(other, exact) + torch.finfo(dtype).eps


def test_attention_keeps_its_inputs_only():
    values = attention_inputs(32, torch.bfloat16)
    assert saved_bytes(lambda: ShortAttention.apply(*values, None)) == sum(x.nbytes for x in values)


def test_attention_applies_to_short_unpadded_training_batches_only(monkeypatch):
    model = tiny_model("gpt2")
    prepare_for_training(model)
    assert model.config._attn_implementation == NAME
    calls = []
    monkeypatch.setattr(ShortAttention, "apply", lambda *a: calls.append(1) or a[0])
    model(IDS)
    assert len(calls) == 2
    with torch.no_grad():
        model(IDS)
    padded = torch.ones_like(IDS)
    padded[0, :5] = 0
    model(IDS, attention_mask=padded)
    assert len(calls) == 2
    assert LONGEST >= 64


def test_padding_gives_the_same_as_before():
    model = tiny_model("gpt2")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    before = model(IDS, attention_mask=mask).logits
    prepare_for_training(model)
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits, before)


def test_generation_after_preparing():
    model = tiny_model("gpt2")
    before = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    prepare_for_training(model, checkpointing=True)
    assert torch.equal(model.eval().generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0), before)


def test_bitsandbytes_can_be_left_out(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert leave_out_bitsandbytes()
    with pytest.raises(ImportError):
        import bitsandbytes  # noqa: F401
    allow_bitsandbytes()
    assert "bitsandbytes" not in sys.modules
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    assert not leave_out_bitsandbytes()
