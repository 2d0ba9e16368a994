"""How a base is loaded: by whom it is quantised, what is said of it, and that every way gives the same model."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from tests.training.uniform import QUICK, x_target
from xfactor_peft import LoadOptions, LoraOptions, TrainOptions, XFactorError, train
from xfactor_peft.base import hardware
from xfactor_peft.base.hardware import pick_dtype, quantized_by
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.quantised import numbers
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.options import Recipe
from xfactor_peft.runs.run import train_to_folder

IDS = torch.arange(24).view(2, 12)
KINDS = {("int8", "native"): "Int8Linear", ("nf4", "native"): "NF4Linear",
         ("int8", "bitsandbytes"): "Linear8bitLt", ("nf4", "bitsandbytes"): "Linear4bit"}  # fmt: skip


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize(("quantization", "backend"), KINDS)
def test_which_layers_are_quantised_and_by_whom(load_tiny, quantization, backend):
    """GPT-2 has four linear layers a block; embeddings, norms and the tied head stay as they are."""
    plain, base = load_tiny(), load_tiny(quantization=quantization, backend=backend)
    kind = KINDS[quantization, backend]
    assert base.quantized == {kind: 8}
    assert f"quantised by {backend}: 8 {kind}" in base.describe()
    assert (base.quantization, base.record()["quantized_layers"]) == (quantization, {kind: 8})
    assert base.model.get_output_embeddings().weight.dtype == torch.float32
    distance = (logits(base.model) - logits(plain.model)).norm() / logits(plain.model).norm()
    assert 0 < distance < (0.06 if quantization == "int8" else 0.5)  # four bits of peaked random weights


def test_nf4_of_either_is_the_same_model(load_tiny):
    ours, theirs = (logits(load_tiny(quantization="nf4", backend=b).model) for b in ("native", "bitsandbytes"))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_the_cpu_is_ours_and_the_gpu_bitsandbytes():
    for quantization in ("int8", "nf4"):
        options = LoadOptions(quantization=quantization)
        assert quantized_by(options, torch.device("cpu")) == "native"
        assert quantized_by(options, torch.device("cuda")) == "bitsandbytes"
    assert quantized_by(LoadOptions(), torch.device("cpu")) is None


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_the_default_where_it_is_fast_and_named_slow_elsewhere(fast, monkeypatch, recwarn):
    monkeypatch.setattr(hardware, "multiplies_bf16", lambda device: fast)
    hardware._name_slow.cache_clear()
    assert pick_dtype("auto", torch.device("cpu")) == ("bf16" if fast else "fp32")
    assert pick_dtype("fp32", torch.device("cpu")) == "fp32"
    assert not recwarn
    assert pick_dtype("bf16", torch.device("cpu")) == "bf16"
    assert ["only emulates bf16" in str(one.message) for one in recwarn] == ([] if fast else [True])


def test_emulated_bf16_is_named_once_whoever_asks(monkeypatch):
    """A plan and a load ask from different places."""
    monkeypatch.setattr(hardware, "multiplies_bf16", lambda device: False)
    hardware._name_slow.cache_clear()

    def ask():
        pick_dtype("bf16", torch.device("cpu"))

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ask()
        ask()
    assert len(seen) == 1


@pytest.mark.parametrize(("quantization", "backend"), KINDS)
def test_a_quantised_base_learns_and_its_adapter_fits_every_other(load_tiny, quantization, backend, tmp_path):
    from xfactor_peft.bank.bank import AdapterBank

    base = load_tiny(quantization=quantization, backend=backend)
    options = TrainOptions(steps=60, seq_len=16, lr=1e-2)
    result, record = train_to_folder(base, x_target(base), tmp_path / "a", Recipe(options, LoraOptions(), QUICK))
    assert result.history[-1].loss < 0.6 * result.history[0].loss
    assert record["base"]["quantized_by"] == backend
    for other in (None, "int8", "nf4"):
        bank = AdapterBank(load_tiny(quantization=other), tmp_path)
        before = logits(bank.model)
        bank.load("a")
        bank.use("a")
        mask = x_target(bank.base).tokens.mask()
        raised = logits(bank.model).softmax(-1)[..., mask].sum(-1).mean() / before.softmax(-1)[..., mask].sum(-1).mean()
        assert raised > 3


def test_a_checkpoint_that_transformers_must_load_is_quantised_all_the_same(load_tiny, monkeypatch):
    from xfactor_peft.base import loading

    expected = logits(load_tiny(quantization="int8").model)

    def refuse(*_, **__):
        raise loading.UnsupportedCheckpoint("for the test")

    monkeypatch.setattr(loading, "load_streaming", refuse)
    assert torch.equal(logits(load_tiny(quantization="int8").model), expected)
    assert load_tiny().quantized == {}


def test_full_fine_tuning_of_a_quantised_model_is_refused(load_tiny):
    base = load_tiny(quantization="int8")
    with pytest.raises(XFactorError, match="cannot train a quantised model"):
        train(base, x_target(base), TrainOptions(method="full"))


def test_a_damaged_file_is_one_line(tiny_folders, tmp_path):
    for file in tiny_folders["gpt2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(XFactorError, match="cannot be loaded as a causal language model: ") as error:
        load_base(resolve_model(str(tmp_path)), LoadOptions(dtype="fp32"))
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(XFactorError):
        load_base(resolve_model(str(tmp_path)))


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_weights_are_counted_in_numbers_not_bytes(load_tiny, quantization):
    """The share of trainable parameters is that of the model, however its weights are stored."""
    plain, small = load_tiny().model, load_tiny(quantization=quantization).model
    assert numbers(small) == numbers(plain) == sum(p.numel() for p in plain.parameters())
    stored = sum(p.numel() for p in small.parameters())
    assert (stored < numbers(small)) == (quantization == "nf4")
