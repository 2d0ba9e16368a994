"""DoRA, rsLoRA, PiSSA and LoRA+: each trained, saved, loaded, swapped and merged once."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.adapters.editing import edit_config, logits
from tests.conftest import SHORT_EVALUATION
from tests.tiny import tiny_model
from xfactor_peft.adapters.adapter import read_adapter
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.bank.merging import merge
from xfactor_peft.errors import XFactorError
from xfactor_peft.lora.wrap import add_lora
from xfactor_peft.objective.targets import UniformTarget
from xfactor_peft.options import LORA_VARIANTS, LoraOptions, Recipe, TrainOptions
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.tokens.token_set import TokenSet
from xfactor_peft.training.optimizers import build_optimizer

OPTIONS = TrainOptions(steps=12, seq_len=16, lr=3e-3)


@pytest.mark.parametrize("variant", [v for v in LORA_VARIANTS if v != "lora"])
def test_each_variant_trains_saves_and_merges(variant, load_tiny, tmp_path):
    base = load_tiny()
    target = UniformTarget(TokenSet.contains(base.tokenizer, "X"))
    lora = LoraOptions(r=4, variant=variant)
    result, record = train_to_folder(base, target, tmp_path / "v", Recipe(OPTIONS, lora, SHORT_EVALUATION))
    assert result.history[-1].loss < result.history[0].loss - 0.2
    assert record["lora"]["variant"] == variant
    adapted = logits(result.model)
    config = json.loads((tmp_path / "v/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "v/adapter_model.safetensors")
    expected = {
        "dora": (True, False, 4),
        "rslora": (False, True, 4),
        "pissa": (False, False, 8),
        "lora+": (False, False, 4),
    }
    assert (config["use_dora"], config["use_rslora"], config["r"]) == expected[variant]
    assert any("magnitude" in name for name in tensors) is (variant == "dora")
    assert config["init_lora_weights"] is True

    plain = PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "v").eval()
    torch.testing.assert_close(logits(plain), adapted, atol=2e-4, rtol=1e-4)
    bank = AdapterBank(load_tiny(), tmp_path)
    before = logits(bank.model)
    bank.load("v")
    bank.use("v")
    torch.testing.assert_close(logits(bank.model), adapted, atol=2e-4, rtol=1e-4)
    with bank.base_only():
        assert torch.equal(logits(bank.model), before)
    assert torch.equal(logits(tiny_model("gpt2")), before)
    torch.testing.assert_close(logits(merge(bank, "v")), adapted, atol=1e-3, rtol=1e-4)


def test_pissa_gives_the_base_back(load_tiny, tmp_path):
    """While it trains the base lacks its largest directions; afterwards adapter off is the base again."""
    base = load_tiny()
    before = logits(base.model)
    model = add_lora(base.model, LoraOptions(r=4, variant="pissa"))
    torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=1e-3)
    with model.disable_adapter():
        assert (logits(model) - before).abs().max() > 0.1
    base = load_tiny()
    target = UniformTarget(TokenSet.contains(base.tokenizer, "X"))
    result, _ = train_to_folder(
        base, target, tmp_path / "p", Recipe(OPTIONS, LoraOptions(r=4, variant="pissa"), SHORT_EVALUATION)
    )
    with result.model.disable_adapter():
        torch.testing.assert_close(logits(result.model), before, atol=1e-4, rtol=1e-4)
    edit_config(init_lora_weights="pissa")(tmp_path / "p")
    with pytest.raises(XFactorError, match="pissa, changes the base's weights"):
        read_adapter(tmp_path / "p")


def test_lora_plus_has_two_learning_rates():
    model = add_lora(tiny_model("gpt2"), LoraOptions(r=4, variant="lora+"))
    optimizer = build_optimizer("adam", model.parameters(), 1e-3, lora_plus=model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_side = {("lora_B" in name, rates[id(p)]) for name, p in model.named_parameters() if p.requires_grad}
    assert by_side == {(False, 1e-3), (True, 1.6e-2)}


def test_what_variants_cannot_do(load_tiny, run, tiny_folders):
    with pytest.raises(XFactorError, match=r"`lora\.variant` must be one of"):
        LoraOptions(variant="qlora")
    with pytest.raises(XFactorError, match="the set head is plain LoRA"):
        LoraOptions(variant="dora", target="all,head")
    for variant in ("dora", "pissa"):
        with pytest.raises(XFactorError, match=f"`lora.variant={variant}` needs the base unquantised"):
            add_lora(load_tiny(quantization="int8").model, LoraOptions(variant=variant))
    brief = ["--steps", 3, "--seq-len", 8, "--eval-tokens", 8, "--eval-repeats", 1, "--dtype", "fp32"]
    output = run("train", "--model", tiny_folders["gpt2"], "--lora-variant", "dora", *brief).output
    assert "saved to adapters/X-dora-r8" in output
