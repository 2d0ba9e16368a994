"""What was asked for is done, or said: layers of other classes, stacked experts, models without anything to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, MixtralConfig, PhimoeConfig, Qwen2MoeConfig
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.pytorch_utils import Conv1D

from tests.base.test_claims import IDS, load
from tests.tiny import CONTEXT, VOCABULARY, WEIGHT_STD, tiny_tokenizer
from tests.training.uniform import QUICK, x_target
from xfactor_peft.errors import XFactorError
from xfactor_peft.lora.wrap import add_lora, matched_modules, unmatched_modules
from xfactor_peft.lowmem import streaming
from xfactor_peft.lowmem.linears import is_linear
from xfactor_peft.options import LoraOptions, Recipe, TrainOptions
from xfactor_peft.runs.run import train_to_folder

WIDE = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "initializer_range": WEIGHT_STD, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
DEEP = WIDE | {"intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
CONFIGS = {
    "falcon": lambda: FalconConfig(**WIDE),
    "mixtral": lambda: MixtralConfig(**DEEP, num_local_experts=4),
    "phimoe": lambda: PhimoeConfig(**DEEP, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **DEEP, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=64, num_experts_per_tok=2
    ),
}
ATTENTION = {f"self_attn.{name}_proj": 2 for name in "qkvo"}
EXPERTS = {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("reached")
    for name, config in CONFIGS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config(), dtype=torch.float32).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    return root


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


def test_a_linear_layer_is_one_by_what_it_computes():
    assert all(map(is_linear, (nn.Linear(4, 4), Conv1D(4, 4), Renamed(4, 4), FalconLinear(4, 4))))
    assert not any(map(is_linear, (Doubled(4, 4), nn.Embedding(4, 4), nn.LayerNorm(4))))
    assert not any(is_linear(router.__new__(router)) for router in (PhimoeTopKRouter, Llama4Router))


@pytest.mark.parametrize(("quantization", "kind", "error"), [("int8", "Int8Linear", 0.1), ("nf4", "NF4Linear", 0.7)])
def test_falcon_is_quantised(folders, quantization, kind, error):
    plain, base = load(folders / "falcon"), load(folders / "falcon", quantization=quantization)
    assert base.quantized == {kind: 8}
    assert base.unquantized == {}
    distance = (base.model(IDS).logits - plain.model(IDS).logits).norm() / plain.model(IDS).logits.norm()
    assert 1e-4 < distance < error


def test_falcon_trains_in_8_bit(folders, tmp_path):
    base = load(folders / "falcon", quantization="int8")
    options = TrainOptions(steps=8, batch_size=2, seq_len=16, lr=1e-2)
    result, _ = train_to_folder(base, x_target(base), tmp_path / "a", Recipe(options, LoraOptions(r=4), QUICK))
    assert result.history[-1].loss < result.history[0].loss - 0.05
    assert sum(result.modules.values()) == 8
    assert result.unmatched == {}


def test_nothing_to_quantise_is_an_error(folders, monkeypatch):
    with pytest.raises(XFactorError, match=r"`quantization=int8`: bitsandbytes finds no layer .*`backend=native`"):
        load(folders / "falcon", quantization="int8", backend="bitsandbytes")
    monkeypatch.setattr(streaming, "is_linear", lambda layer: False)
    with pytest.raises(XFactorError, match="native finds no layer to quantise in FalconForCausalLM; load it without"):
        load(folders / "falcon", quantization="int8")


@pytest.mark.parametrize(
    ("name", "router", "share"), [("mixtral", "gate", 89), ("qwen2_moe", "gate", 50), ("phimoe", "router", 89)]
)
@pytest.mark.parametrize("backend", ["native", "bitsandbytes"])
def test_stacked_experts_that_stay_as_they_are_are_named(folders, name, router, share, backend):
    base = load(folders / name, quantization="int8", backend=backend)
    assert base.unquantized == {f"mlp.{router}": 2} | EXPERTS
    assert base.record()["unquantized_weights"] == base.unquantized
    line = f"not quantised: mlp.{router} x 2, mlp.experts.gate_up_proj x 2, mlp.experts.down_proj x 2, {share}% of"
    assert line in base.describe()
    assert "not quantised" not in load(folders / name).describe()  # nobody asked


@pytest.mark.parametrize(("name", "router"), [("mixtral", "gate"), ("phimoe", "router")])
def test_lora_says_which_experts_it_leaves_out(folders, name, router):
    base = load(folders / name)
    assert matched_modules(base.model, "all") == ATTENTION
    assert unmatched_modules(base.model, "all") == {f"mlp.{router}": 2} | EXPERTS
    assert unmatched_modules(base.model, "attention") == unmatched_modules(base.model, "head") == {}
    refusal = "`lora.target=mlp` matches no layer.*there is no LoRA for .*mlp.experts.down_proj x 2"
    with pytest.raises(XFactorError, match=refusal):
        matched_modules(base.model, "mlp")


def test_a_dense_model_leaves_nothing_out(load_tiny):
    for kind in ("gpt2", "llama", "gpt_neox", "opt"):
        for options in ({}, {"quantization": "nf4"}):
            base = load_tiny(kind, **options)
            assert [unmatched_modules(base.model, target) for target in ("all", "attention", "mlp")] == [{}, {}, {}]
            assert base.unquantized == {}


def test_the_record_and_the_summary_name_them(folders, run):
    arguments = ["--model", folders / "qwen2_moe", "--dtype", "fp32", "--load-in-8bit", "--steps", 1, "--seq-len", 8]
    output = run("train", *arguments, "--target", "all", "--eval-tokens", 2, "--output", "a").output
    text = " ".join(output.split())
    assert "not quantised: mlp.gate x 2, mlp.experts.gate_up_proj x 2" in text
    assert "no lora on mlp.gate x 2, mlp.experts.gate_up_proj x 2, mlp.experts.down_proj x 2, which stay" in text


def test_a_layer_that_peft_leaves_alone_is_an_error(load_tiny, monkeypatch):
    from xfactor_peft.lora import wrap

    monkeypatch.setattr(wrap, "get_peft_model", lambda model, config: model)
    with pytest.raises(XFactorError, match=r"PEFT puts no LoRA on transformer.h.0.attn.c_attn of GPT2LMHeadModel"):
        add_lora(load_tiny().model, LoraOptions())
