"""The head's few numbers a position against the whole vocabulary, and PEFT's layer against the head."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from xfactor_peft.base.split_model import split
from xfactor_peft.options import PhraseOptions
from xfactor_peft.phrases.head import PhraseHead, Positions, fit, joined, mean_kl
from xfactor_peft.phrases.train import write_head
from xfactor_peft.phrases.trunk import wrap

V, D, N = 50, 8, 40


@pytest.fixture
def problem():
    torch.manual_seed(0)
    weight, hidden = torch.randn(V, D), torch.randn(N, D)
    tokens = np.array([3, 7, 11, 40])
    head = PhraseHead(tokens, weight, None, rank=2)
    with torch.no_grad():
        head.b.normal_()
        head.offset.normal_()
    table = torch.randn(3, 4) * 2
    state, came, own = torch.arange(N) % 3, torch.arange(N) % 5 - 1, torch.randn(N)
    return (
        head,
        Positions((hidden,), torch.arange(N), (hidden @ weight.T).logsumexp(1), table, state, came, own, torch.ones(N)),
        weight,
    )


def whole(head, at, weight):
    """(KL(q || student), KL(q || base)) over all tokens."""
    log_p = (at.hidden[0] @ weight.T).log_softmax(1)
    teacher, student = log_p.clone(), log_p.clone()
    weights = at.table[at.state]
    for row in (at.came >= 0).nonzero().squeeze(1).tolist():
        weights[row, at.came[row]] = at.own[row]
    teacher[:, head.tokens] += weights
    student[:, head.tokens] += head(at.hidden[0]).detach()
    q, pi = teacher.log_softmax(1), student.log_softmax(1)
    return (q.exp() * (q - pi)).sum(1), (q.exp() * (q - log_p)).sum(1)


def test_kl_on_few_tokens_is_kl_on_all(problem):
    head, at, weight = problem
    for got, expected in zip(head.kl(at, torch.arange(N)), whole(head, at, weight), strict=True):
        torch.testing.assert_close(got.detach(), expected, atol=1e-5, rtol=1e-4)


def test_positions_of_several_texts_are_those_of_each(problem):
    _, at, _ = problem
    some = torch.tensor([1, 4, 5])
    fewer = replace(
        at, **{name: getattr(at, name)[some] for name in ("place", "log_z", "state", "came", "own", "weight")}
    )
    both, rows = joined([at, fewer, at]), torch.arange(2 * N + 3)
    order = torch.cat([torch.arange(N), some, torch.arange(N)])
    torch.testing.assert_close(both.states(rows), at.hidden[0][order])
    torch.testing.assert_close(both.log_weights(rows.flip(0)), at.log_weights(order.flip(0)))


def test_a_student_that_is_the_teacher_has_nothing_to_learn(problem):
    head, at, _ = problem
    with torch.no_grad():
        head.a.zero_()
        head.offset.copy_(at.table[0])
    rows = ((at.state == 0) & (at.came < 0)).nonzero().squeeze(1)
    torch.testing.assert_close(head.kl(at, rows)[0], torch.zeros(len(rows)), atol=1e-5, rtol=0)
    assert head.kl(at, (at.state == 1).nonzero().squeeze(1))[0].mean() > 0.01


def test_fitting_comes_nearer_and_context_helps(problem):
    _, at, weight = problem
    left = {}
    for rank in (0, 4):
        head = PhraseHead(np.array([3, 7, 11, 40]), weight, None, rank)
        head.start(at)
        before = mean_kl(head, at)[0]
        fit(head, at, epochs=150, lr=0.03)
        left[rank] = mean_kl(head, at)[0]
        assert left[rank] < before
    assert left[4] < 0.9 * left[0]


def test_the_adapter_is_the_head(tiny):
    policy = split(tiny.model)
    tokens = np.array([5, 9, 20])
    head = PhraseHead(tokens, policy.weight, policy.bias, rank=2)
    with torch.no_grad():
        head.b.normal_()
        head.offset.normal_()
    head.ban(np.array([30]))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = policy.hidden(ids)[0]
        expected = policy.logits(hidden).float()
        plain = expected.clone()
        head.add_to(expected, hidden, np.zeros(12))
        model = wrap(tiny, PhraseOptions(trunk_r=0), 2).eval()
        write_head(tiny, head)
        got = model(input_ids=ids).logits[0].float()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    others = [i for i in range(len(plain[0])) if i not in (5, 9, 20, 30)]
    torch.testing.assert_close(got[:, others], plain[:, others], atol=1e-5, rtol=1e-5)
    assert (got[:, 30].softmax(0) >= 0).all()
    assert float(got.softmax(1)[:, 30].max()) == 0.0
