"""A fast part of the table of `tools/architectures.py`; see `tests.architectures.examine`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures import (
    ARCHITECTURES,
    FAST,
    architecture_folder,
    distance_to_definition,
    examine,
    load,
    trained_layers,
)
from tools.architectures import END, START, table

ROOT = Path(__file__).parents[1]
REFUSED = {
    "gemma2": "Gemma2ForCausalLM changes its logits after the output embedding",
    "cohere": "CohereForCausalLM changes its logits after the output embedding",
    "openai-gpt": "OpenAIGPTLMHeadModel gives other states with a key-value cache",
    "deepseek_v3": "PEFT puts no LoRA on model.layers.0.mlp",
    "mamba": "is a mamba model, which has no attention heads",
}
LAYERS = {"gptj": 12, "bloom": 8, "falcon": 8, "qwen3": 14, "olmo2": 14, "mixtral": 8, "phimoe": 8, "jamba": 7}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    return lambda name: root / name if (root / name).is_dir() else architecture_folder(name, root / name)


@pytest.mark.parametrize("name", FAST)
def test_everything_holds_or_a_refusal_names_the_model(built, name):
    row = examine(name, built(name))
    assert row.holds, row
    assert bool(row.refusal) is (name in REFUSED)
    if row.refusal:
        assert REFUSED[name] in row.refusal
        return
    assert row.trained == row.moved == LAYERS[name]
    assert bool(row.refused_quantised) is (name == "jamba")
    assert row.quantised == (0 if name == "jamba" else LAYERS[name])
    assert bool(row.left) is (name in ("mixtral", "phimoe"))


def test_the_definition_is_not_met_by_other_codes(built):
    """Negative control: one layer's scales are off by 2 %."""
    base = load(built("gptj"), quantization="int8")
    layer = base.model.get_submodule("transformer.h.1.mlp.fc_in")
    assert distance_to_definition(base, built("gptj")) < 1e-5
    dequantize = type(layer).dequantize
    layer.dequantize = lambda *args: 1.02 * dequantize(layer, *args)
    with pytest.raises(AssertionError, match=r"transformer.h.1.mlp.fc_in"):
        distance_to_definition(base, built("gptj"))
    layer.dequantize = lambda *args: 1.001 * dequantize(layer, *args)
    assert distance_to_definition(base, built("gptj")) > 1e-5


def test_a_layer_that_does_not_move_is_counted(built, monkeypatch):
    """Negative control: a layer whose gradient is held back is missing among those that moved."""
    from xfactor_peft.training import loop

    check = loop._check_step

    def hold_back(made, *rest):
        check(made, *rest)
        with torch.no_grad():
            name, side = next((n, p) for n, p in base.model.named_parameters() if "lora_B" in n)
            assert side.grad is not None, name
            side.grad = None

    base = load(built("gptj"))
    monkeypatch.setattr(loop, "_check_step", hold_back)
    assert trained_layers(base)[:2] == (12, 11)


def test_the_list_is_of_forty_and_more_that_transformers_can_build():
    assert len(set(ARCHITECTURES)) == len(ARCHITECTURES) >= 40
    assert set(ARCHITECTURES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING)
    assert set(FAST) <= set(ARCHITECTURES)


def test_the_page_holds_a_row_of_each_and_those_of_the_fast_part_are_what_is_found(built):
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    shown = page.split(START)[1].split(END)[0].strip().splitlines()
    assert [line.split("|")[1].strip() for line in shown[2:]] == sorted(ARCHITECTURES)
    for name in ("gptj", "mixtral", "mamba", "jamba"):
        assert table([examine(name, built(name))]).splitlines()[2] in shown
