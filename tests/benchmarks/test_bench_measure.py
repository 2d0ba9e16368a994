"""What the benchmark measures, and the correctness checks that come before it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import xfactor_peft as xf
from benchmarks.bench import arms, checks, floor, measure, texts
from benchmarks.bench.plan import Run
from benchmarks.bench.presets import Settings
from xfactor_peft.base.split_model import split
from xfactor_peft.lowmem.int8 import Int8Linear
from xfactor_peft.objective import kl as losses
from xfactor_peft.options import OPTIMIZERS
from xfactor_peft.training.optimizers import build_optimizer

SETTINGS = Settings(steps=12, seq_len=16, prompts=2, repeats=1, new_tokens=8, probe_every=5, windows=2)


@pytest.fixture
def places(tiny_folders):
    return measure.Places({"tiny": str(tiny_folders["gpt2"])}, "cpu")


def target_of(base):
    return xf.UniformTarget(xf.TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size))


def test_every_check_passes(places):
    record = checks.run_checks("tiny", places)
    assert record["ok"], [check for check in record["checks"] if not check["ok"]]
    names = " ".join(check["name"] for check in record["checks"])
    assert all(word in names for word in ("fused KL", "Int8Linear", "NF4Linear", "PEFT", "transformers", "8-bit Adam"))
    assert record["model"]["name"] == "tiny"


def test_a_wrong_loss_fails_its_check(tiny, monkeypatch):
    right = losses.kl_loss
    monkeypatch.setattr(losses, "kl_loss", lambda *args: (right(*args).loss * 1.001, None))
    assert not any(check["ok"] for check in checks.fused_kl(tiny) if "float32" in check["name"])


def test_a_wrong_layer_fails_its_check(monkeypatch):
    right = Int8Linear.transposed_product
    monkeypatch.setattr(Int8Linear, "transposed_product", lambda self, gradient: right(self, gradient) * 1.1)
    assert not checks.quantized_layer(Int8Linear, checks.INT8_ACTIVATIONS)["ok"]


def test_an_error_that_is_no_number_fails():
    assert not checks.verdict("x", float("nan"), 1.0)["ok"]


def test_no_state_and_no_adapter_gets_below_the_floor(load_tiny):
    base = load_tiny()
    target = target_of(base)
    low = floor.frozen_head_floor(base.model, target)
    norm, split_model = base.model.transformer.ln_f, split(base.model)
    states = norm(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * 3)
    others = [
        float(losses.kl_loss(state[None], split_model.weight, target.probabilities(), target.tokens.mask()).loss)
        for state in states
    ]
    assert low < min(others)
    options = xf.TrainOptions(steps=60, lr=1e-2, seq_len=16)
    result = xf.train(base, target, options, xf.LoraOptions(r=16, alpha=32), measure.QUICK)
    assert low - 1e-3 < result.history[-1].loss < low + 0.5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "opt"])
def test_every_family_has_a_floor(load_tiny, kind):
    base = load_tiny(kind)
    assert 0 <= floor.frozen_head_floor(base.model, target_of(base)) < 8


def test_perplexity_is_that_of_the_models_own_loss(tiny):
    windows = texts.held_out_windows(tiny.tokenizer, 3, 32)
    assert windows.shape == (3, 32)
    with torch.no_grad():
        logits = tiny.model(input_ids=windows).logits
    expected = math.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))
    assert texts.perplexity(split(tiny.model), windows) == pytest.approx(expected, rel=1e-4)


def test_pieces_are_the_text_and_know_their_set(tiny):
    ids = tiny.tokenizer("An X marks the spot, XX!")["input_ids"]
    tokens = xf.TokenSet.contains(tiny.tokenizer, "X", vocab_size=tiny.vocab_size)
    found = texts.pieces(tiny.tokenizer, ids, set(tokens.ids))
    assert "".join(text for text, _ in found) == "An X marks the spot, XX!"
    assert all(("X" in text) == inside for text, inside in found)
    assert sum(inside for _, inside in found) == 2


def test_a_training_run_measures_everything(places):
    seen = []
    run = Run("train", arms.Arm(dtype="fp32", quantization="int8"), "tiny", SETTINGS, lr=1e-2)
    record = measure.measure(run, places, lambda step, loss: seen.append(step))
    assert seen == list(range(1, 13))
    assert [step for step, _ in record["probes"]] == [5, 10]
    assert record["loss"][-1] < record["loss"][0] - 1
    assert record["scores"]["kl_from_base"] > 0.1
    assert record["held_out"]["ratio"] != 1.0
    assert record["file_bytes"] > 4 * record["trainable_parameters"]
    assert record["train_peak"]["rss_mib"] > 50
    assert record["model"]["quantized_layers"] == {"Int8Linear": 8}
    assert record["model"]["name"] == "tiny"
    assert record["samples"][0]["tokens"] > 0


def test_full_fine_tuning_is_scored_against_the_untrained_model(places):
    record = measure.measure(
        Run("train", arms.FULL_8BIT_ADAM, "tiny", SETTINGS, lr=1e-2), places, lambda step, loss: None
    )
    assert record["scores"]["kl_from_base"] > 0.5
    assert record["file_bytes"] == 4 * record["trainable_parameters"]
    assert record["held_out"]["after"] > record["held_out"]["before"]


def test_sampling_during_training_changes_nothing_of_it(places):
    run = Run("train", arms.LORA_FP32, "tiny", SETTINGS, lr=1e-2)
    plain = Run("train", arms.LORA_FP32, "tiny", Settings(**{**SETTINGS.record(), "probe_every": 0}), lr=1e-2)
    first, second = (measure.measure(r, places, lambda step, loss: None) for r in (run, plain))
    assert first["loss"] == second["loss"]
    assert second["probes"] == []


def test_the_sweep_takes_the_rate_with_the_lowest_loss(places):
    run = Run("sweep", arms.LORA_FP32, "tiny", SETTINGS, rates=(1e-6, 1e-2, 1e-4))
    record = measure.measure(run, places, lambda step, loss: None)
    assert record["lr"] == 1e-2
    assert [trial["lr"] for trial in record["tried"]] == [1e-6, 1e-2, 1e-4]


def test_the_base_is_scored_with_its_logit_biases(places):
    run = Run("base", arms.BASE, "tiny", SETTINGS, strengths=(2.0, 8.0))
    record = measure.measure(run, places, lambda step, loss: None)
    assert record["scores"]["kl_from_base"] == pytest.approx(0, abs=1e-5)
    assert record["held_out"]["ratio"] == pytest.approx(1)
    weak, strong = (point["kl_from_base"] for point in record["bias"])
    assert 0 < weak < strong
    assert record["floor"] > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(load_tiny, name):
    base = load_tiny()
    options = xf.TrainOptions("full", steps=25, seq_len=16, lr=0.1 if name == "adafactor" else 3e-3, optimizer=name)
    history = xf.train(base, target_of(base), options, None, measure.QUICK).history
    assert history[-1].loss < 0.5 * history[0].loss


def state_bytes(name: str) -> int:
    parameter = torch.nn.Parameter(torch.randn(256, 128))
    optimizer = build_optimizer(name, [parameter], 1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(
        value.numel() * value.element_size() for value in state if torch.is_tensor(value) and value.numel() > 256
    )


def test_low_memory_optimizers_keep_little():
    weights = 256 * 128
    assert state_bytes("adam") == 8 * weights
    assert state_bytes("adam8bit") < 2.1 * weights
    assert state_bytes("adafactor") < 0.1 * weights


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(xf.XFactorError, match="--optimizer must be one of adam, adamw, adam8bit, adafactor; got 'sgd'"):
        build_optimizer("sgd", [], 1e-3)
    with pytest.raises(xf.XFactorError, match="got 'sgd'"):
        xf.TrainOptions(optimizer="sgd")
