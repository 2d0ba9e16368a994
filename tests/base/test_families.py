"""Every family of causal language models: train, in 8 bit too, save, swap, merge; or a clear refusal."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.adapters.editing import logits
from tests.families import FAMILIES, family_folder
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.bank.merging import merge
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.base.split_model import split
from xfactor_peft.errors import XFactorError
from xfactor_peft.objective.targets import TiltedTarget, UniformTarget
from xfactor_peft.options import (
    EvalOptions,
    LoadOptions,
    LoraOptions,
    ObjectiveOptions,
    Recipe,
    SamplingOptions,
    TrainOptions,
)
from xfactor_peft.runs.run import train_to_folder
from xfactor_peft.tokens.token_set import TokenSet

BRIEF = EvalOptions(("The fox",), 1, SamplingOptions(max_new_tokens=4))
OPTIONS = TrainOptions(steps=8, batch_size=2, seq_len=16, lr=1e-2)


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """loader(family, ...): a fresh base of a family."""
    root = tmp_path_factory.mktemp("families")
    folder = cache(lambda family: family_folder(family, root / family))
    return lambda family, **options: load_base(
        resolve_model(str(folder(family))), LoadOptions(**{"dtype": "fp32", **options})
    )


def tokens_of(base, text="X"):
    return TokenSet.contains(base.tokenizer, text, vocab_size=base.vocab_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_train_save_swap_merge(family, loader, tmp_path):
    for name, quantization, text in (("x", None, "X"), ("q", "int8", "Z")):
        base = loader(family, quantization=quantization)
        assert bool(base.quantized) is (quantization is not None)
        target = UniformTarget(tokens_of(base, text))
        result, _ = train_to_folder(base, target, tmp_path / name, Recipe(OPTIONS, LoraOptions(r=4), BRIEF))
        assert result.history[-1].loss < result.history[0].loss - 0.05
    base = loader(family)
    plain = logits(base.model)
    bank = AdapterBank(base, tmp_path)
    seen = {}
    for name in ("x", "q", None, "x", "q"):
        if name:
            bank.load(name)
        bank.use(name)
        assert torch.equal(seen.setdefault(name, logits(bank.model)), logits(bank.model))
    assert torch.equal(seen[None], plain)
    assert (seen["x"] - plain).abs().max() > 0.01
    assert (seen["x"] - seen["q"]).abs().max() > 0.01
    merge(bank, "x").save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(again), seen["x"], atol=1e-3, rtol=1e-4)
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied is bool(again.config.tie_word_embeddings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_set_head_merges_or_is_refused(family, loader, tmp_path):
    """It has a place where the head has a bias (phi) or a LayerNorm is before it; behind an RMSNorm it has none."""
    base = loader(family)
    target = TiltedTarget.of(tokens_of(base), strength=2.0)
    objective = ObjectiveOptions(contexts="random", dial=False, frontier=False)
    train_to_folder(base, target, tmp_path / "h", Recipe(TrainOptions(steps=1, seq_len=8), None, BRIEF, objective))
    bank = AdapterBank(loader(family), tmp_path)
    plain = logits(bank.model)
    bank.load("h")
    bank.use("h")
    adapted = logits(bank.model)
    raised = 2.0 * target.tokens.mask().expand_as(plain)
    torch.testing.assert_close(adapted - plain, raised, atol=1e-3, rtol=0)
    if family in ("llama", "llama-tied", "qwen", "mistral", "gemma"):
        with pytest.raises(XFactorError, match="no bias in its output embedding and no LayerNorm before it"):
            merge(bank, "h")
        return
    merge(bank, "h").save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(again), adapted, atol=1e-3, rtol=1e-4)


def test_soft_capped_logits_are_refused(loader, tmp_path):
    base = loader("gemma2")
    with pytest.raises(XFactorError, match=r"Gemma2ForCausalLM .*soft-cap"):
        train_to_folder(base, UniformTarget(tokens_of(base)), tmp_path / "x", Recipe(OPTIONS, LoraOptions(r=4), BRIEF))
    assert list(tmp_path.iterdir()) == []
    base.model.config.final_logit_softcapping = 1e4  # too weak to be seen in the logits
    with pytest.raises(XFactorError, match="soft-cap"):
        split(base.model)
    base.model.config.final_logit_softcapping = None
    split(base.model)
