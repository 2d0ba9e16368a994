"""What the benchmark measures, and the correctness checks that come before it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from bench.training import arms, checks, floor, measure, texts
from bench.training.plan import Run
from bench.training.presets import Settings
from torch.nn import functional as F

import xfactor_peft as xf
from xfactor_peft.base.split_model import split
from xfactor_peft.lowmem.int8 import Int8Linear
from xfactor_peft.objective import kl as losses
from xfactor_peft.options import OPTIMIZERS
from xfactor_peft.training.optimizers import build_optimizer

SETTINGS = Settings(steps=12, seq_len=16, prompts=2, repeats=1, new_tokens=8, probe_every=5, windows=2)


@pytest.fixture
def measured(tiny_folders):
    """measured(group, arm, ...) -> the figures of a run on the tiny model; keyword on_step takes the steps."""

    def call(group, arm, settings=SETTINGS, on_step=lambda step, loss: None, **options):
        run = Run(group, arm, "tiny", settings, **options)
        return measure.measure(run.spec(), on_step, {"tiny": str(tiny_folders["gpt2"])}, "cpu")

    return call


@pytest.fixture
def checked(tiny_folders):
    """checked() -> the record of the correctness checks on the tiny model."""
    return lambda: checks.run_checks({"model": "tiny"}, None, {"tiny": str(tiny_folders["gpt2"])}, "cpu")


def target_of(base):
    return xf.UniformTarget(xf.TokenSet.contains(base.tokenizer, "X", vocab_size=base.vocab_size))


def failed(record) -> set[str]:
    return {check["name"] for check in record["checks"] if not check["ok"]}


def test_every_check_passes(checked):
    record = checked()
    assert record["ok"], failed(record)
    names = " ".join(check["name"] for check in record["checks"])
    assert all(word in names for word in ("Int8Linear", "NF4Linear", "full, fp32", "LoRA", "4-bit", "8-bit Adam"))
    assert record["model"]["name"] == "tiny"


def test_a_loss_that_is_a_thousandth_wrong_fails_its_check(checked, monkeypatch):
    right = losses.kl_loss
    monkeypatch.setattr("xfactor_peft.objective.objectives.kl_loss", lambda *args, **more: wrong(right(*args, **more)))

    def wrong(result):
        return result._replace(loss=result.loss * 1.001)

    assert {"losses of full, fp32", "losses of LoRA r=8, attention + MLP, fp32"} <= failed(checked())


def test_a_wrong_layer_fails_its_check(monkeypatch):
    right = Int8Linear.transposed_product
    monkeypatch.setattr(Int8Linear, "transposed_product", lambda self, gradient: right(self, gradient) * 1.1)
    assert not checks.quantized_layer(Int8Linear, checks.LAYERS[Int8Linear])["ok"]


def test_an_error_that_is_no_number_fails():
    assert not checks.verdict("x", 1.0, (torch.tensor(float("nan")), torch.ones(())))["ok"]
    assert not checks.verdict("x", 0.1, (torch.ones(2), torch.ones(2)), (torch.zeros(1), torch.ones(1)))["ok"]


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
    result = xf.train(base, target, options, xf.LoraOptions(r=16, alpha=32), None)
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


def test_a_training_run_measures_everything(measured):
    seen = []
    arm = arms.Arm(dtype="fp32", quantization="int8")
    record = measured("train", arm, lr=1e-2, on_step=lambda step, loss: seen.append(step))
    assert seen == list(range(1, 13))
    assert [step for step, _ in record["probes"]] == [5, 10]
    assert record["loss"][-1] < record["loss"][0] - 1
    assert record["scores"]["kl_from_base"] > 0.1
    assert record["held_out"]["ratio"] != 1.0
    assert record["file_bytes"] > 4 * record["trainable_parameters"]
    assert record["train_peak"]["rss_mib"] > 50
    assert record["model"]["quantized_layers"] == {"Int8Linear": 8}
    assert record["model"]["name"] == "tiny"
    sample = record["samples"][0]
    assert sample["tokens"] > 0
    assert all(("X" in text) == inside for text, inside in sample["pieces"])


def test_full_fine_tuning_is_scored_against_the_untrained_model(measured):
    record = measured("train", arms.FULL_8BIT_ADAM, lr=1e-2)
    assert record["scores"]["kl_from_base"] > 0.5
    assert record["file_bytes"] == 4 * record["trainable_parameters"]
    assert record["held_out"]["after"] > record["held_out"]["before"]


def test_sampling_during_training_changes_nothing_of_it(measured):
    first, second = (
        measured("train", arms.LORA_FP32, replace(SETTINGS, probe_every=every), lr=1e-2) for every in (5, 0)
    )
    assert first["loss"] == second["loss"]
    assert second["probes"] == []


def test_the_sweep_takes_the_rate_with_the_lowest_loss(measured):
    record = measured("sweep", arms.LORA_FP32, rates=(1e-6, 1e-2, 1e-4))
    assert record["lr"] == 1e-2
    assert [trial["lr"] for trial in record["tried"]] == [1e-6, 1e-2, 1e-4]


def test_the_base_is_scored_with_its_logit_biases(measured):
    record = measured("base", arms.BASE, strengths=(2.0, 8.0))
    assert record["scores"]["kl_from_base"] == pytest.approx(0, abs=1e-5)
    assert record["held_out"]["ratio"] == pytest.approx(1)
    weak, strong = (point["kl_from_base"] for point in record["bias"])
    assert 0 < weak < strong
    assert record["floor"] > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(load_tiny, name):
    base = load_tiny()
    options = xf.TrainOptions("full", steps=25, seq_len=16, lr=0.1 if name == "adafactor" else 3e-3, optimizer=name)
    history = xf.train(base, target_of(base), options, None, None).history
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
    with pytest.raises(xf.XFactorError, match="`optimizer` must be one of adam, adamw, adam8bit, adafactor; got 'sgd'"):
        build_optimizer("sgd", [], 1e-3)
    with pytest.raises(xf.XFactorError, match="got 'sgd'"):
        xf.TrainOptions(optimizer="sgd")
