"""The upper blocks alone give what the whole model gives, for every family, and are not used where they do not."""

import pytest
import torch

from tests.tiny import KINDS, tiny_model
from xfactor_peft.base.split_model import split
from xfactor_peft.phrases.trunk import upper_blocks

TEXTS = [torch.tensor([5, 9, 11, 3, 20, 7]), torch.tensor([8, 2, 30])]


def expected(policy):
    return [policy.hidden(one[None])[0] for one in TEXTS]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_upper_blocks_go_on_where_the_lower_ones_stop(kind):
    policy = split(tiny_model(kind).eval())
    upper = upper_blocks(policy)
    hidden = upper.hidden(TEXTS, upper.entering(TEXTS))
    for row, whole in zip(hidden, expected(policy), strict=True):
        torch.testing.assert_close(row[: len(whole)], whole, atol=1e-5, rtol=1e-4)
    assert not upper.whole


@torch.no_grad()
def test_what_enters_is_used():
    policy = split(tiny_model("gpt2").eval())
    upper = upper_blocks(policy)
    other = [states.flip(-1) for states in upper.entering(TEXTS)]
    assert not torch.allclose(upper.hidden(TEXTS, other)[0], expected(policy)[0], atol=1e-2)


@torch.no_grad()
def test_a_model_that_counts_its_blocks_is_run_as_a_whole(monkeypatch):
    policy = split(tiny_model("gpt2").eval())
    block, forward = policy.model.transformer.h[-1], type(policy.model.transformer.h[-1]).forward

    def by_number(self, states, *args, **kwargs):
        return forward(self, states * len(policy.model.transformer.h), *args, **kwargs)

    monkeypatch.setattr(type(block), "forward", by_number)
    upper = upper_blocks(policy)
    assert upper.whole
    hidden = upper.hidden(TEXTS, upper.entering(TEXTS))
    torch.testing.assert_close(hidden[0], expected(policy)[0], atol=1e-4, rtol=1e-4)
