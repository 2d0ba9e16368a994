"""Streaming: the ids of `generate`, nothing global changed, errors where they belong."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import KINDS
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.errors import XFactorError
from xfactor_peft.options import SamplingOptions
from xfactor_peft.sampling.generation import generate, seed_for, stream
from xfactor_peft.tokens.ends import until_end

OPTIONS = SamplingOptions(max_new_tokens=21, seed=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [1, 8])
def test_a_stream_is_what_transformers_generates(load_tiny, kind, piece):
    """To the full length, and to an end of text inside a piece and on its last token."""
    base = load_tiny(kind)
    whole = _generated(base, OPTIONS)
    for end in (None, whole[0], whole[7], whole[9], whole[-1]):
        base.model.generation_config.eos_token_id = [base.tokenizer.eos_token_id, *([] if end is None else [end])]
        expected = until_end(_generated(base, OPTIONS), base.model.generation_config.eos_token_id)
        pieces = list(stream(base.model, base.tokenizer, "The fox", OPTIONS, piece))
        assert pieces[-1] == generate(base.model, base.tokenizer, "The fox", OPTIONS) == expected
        through = len(expected) + (len(expected) < len(whole))  # tokens drawn, the end included
        assert [len(ids) for ids in pieces] == [*range(piece, through, piece), len(expected)]
        assert all(ids == expected[: len(ids)] for ids in pieces)
        assert end is None or len(expected) == whole.index(end)


def _generated(base, options):
    """Through transformers alone."""
    prompt = torch.tensor([base.tokenizer("The fox")["input_ids"]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(options.seed, prompt[0].tolist()))
        ids = base.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, pad_token_id=0,
            max_new_tokens=options.max_new_tokens,
        )  # fmt: skip
    return ids[0, prompt.shape[1] :].tolist()


def test_a_stream_changes_nothing_global(tiny):
    """Not the random state, not the model's mode; and what a caller draws between pieces changes no piece."""
    expected = generate(tiny.model, tiny.tokenizer, "The fox", OPTIONS)
    tiny.model.train()
    torch.manual_seed(9)
    drawn = torch.rand(3)
    torch.manual_seed(9)
    pieces = stream(tiny.model, tiny.tokenizer, "The fox", OPTIONS)
    ids = next(pieces)
    assert torch.equal(torch.rand(3), drawn)
    assert tiny.model.training
    assert next(pieces)[: len(ids)] == ids
    torch.rand(5)
    assert next(pieces) == expected
    assert tiny.model.training
    pieces.close()


def test_errors_reach_the_caller(tiny):
    """The model's own, after which its mode is as before; and those of a prompt."""

    def fail(*_):
        raise RuntimeError("no power")

    tiny.model.train()
    pieces = stream(tiny.model, tiny.tokenizer, "The fox", OPTIONS)
    next(pieces)
    hook = tiny.model.register_forward_pre_hook(fail)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no power"):
        next(pieces)
    hook.remove()
    assert tiny.model.training
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(XFactorError, match="exceed the model's context of 128"):
        next(stream(tiny.model, tiny.tokenizer, "The fox", replace(OPTIONS, max_new_tokens=500)))


def test_a_stream_under_adapters(tiny, adapters_root):
    """Through PEFT's wrapper; a swap on the way is refused, since the cache is the other adapter's."""
    bank = AdapterBank(tiny, adapters_root)
    bank.load("x")
    bank.use("x")
    *_, last = stream(bank.model, tiny.tokenizer, "The fox", OPTIONS)
    assert last == bank.generate("The fox", OPTIONS)
    pieces = stream(bank.model, tiny.tokenizer, "The fox", OPTIONS)
    next(pieces)
    bank.use(None)
    with pytest.raises(XFactorError, match="made under other adapters"):
        next(pieces)
