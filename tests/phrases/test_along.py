"""The weight of what came against the definition: every continuation that the model could have taken, written out."""

import math

import numpy as np
import pytest
import torch

from tests.tokens.test_patterns import demo_tokenizer
from xfactor_peft.phrases.along import weights_along
from xfactor_peft.phrases.goals import PhraseGoal, PhraseTarget, Wanted
from xfactor_peft.phrases.solving import enriching
from xfactor_peft.phrases.texts import Texts
from xfactor_peft.phrases.values import Statistics, Values
from xfactor_peft.tokens.automaton import TokenAutomaton
from xfactor_peft.tokens.patterns import Pattern

WIDTH = 6


class Policy:
    """An output embedding of random rows."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(0)
        self.weight, self.bias = torch.randn(size, WIDTH, generator=generator), torch.randn(size, generator=generator)


@pytest.fixture(scope="module")
def problem():
    tokenizer = demo_tokenizer()
    automaton = TokenAutomaton(tokenizer, (Pattern("*abc*", ignore_case=False),), len(tokenizer))
    letter = {raw: i for i, raw in automaton.bytes.items() if raw in (b"a", b"b", b"c", b" ", b"\xe2")}
    ids = torch.tensor([[letter[bytes([c])] for c in b" ab ababc ab\xe2 "]])  # a row is empty amid a character
    states = np.array([automaton.run(ids[0].tolist())[0][:-1]])
    policy = Policy(automaton.vocab_size)
    policy.bias[list(letter.values())] += 7
    hidden = torch.randn(1, ids.shape[1], WIDTH, generator=torch.Generator().manual_seed(1))
    z = hidden @ policy.weight.T + policy.bias
    statistics = Statistics(automaton)
    for _ in range(3):  # the averages are of other contexts
        other = torch.randn(len(states[0]), automaton.vocab_size)
        statistics.add(states[0], other.softmax(1))
    return (
        policy,
        Texts([[0]], ids, states, hidden, z.logsumexp(2), torch.zeros(ids.shape)),
        z.softmax(2)[0],
        statistics,
    )


@pytest.mark.parametrize("strength", [-20.0, -1.0, 1.5])
def test_weights_are_those_of_the_text_itself(problem, strength):
    policy, texts, p, statistics = problem
    automaton, values = statistics.automaton, Values(statistics, np.array([strength]))
    expected, following = [], 1.0
    for t in reversed(range(texts.ids.shape[1])):
        state, came = int(texts.states[0, t]), int(texts.ids[0, t])
        after, ended = automaton.step(state, came)
        inside = automaton.automaton.inside
        w = math.exp(strength * len(ended)) * (following if inside(after) else 1.0)
        expected.append(math.log(w) if inside(after) or ended else 0.0)
        row, (average, _) = automaton.row(state), values.row(state)
        gains = [float(p[t, i]) * ((w if i == came else average[n]) - 1) for n, i in enumerate(row.ids)]
        following = 1.0 + sum(gains) if inside(state) else 1.0
    assert any(not len(automaton.row(int(state)).ids) for state in texts.states[0])
    found = weights_along(policy, texts, values)[0]
    np.testing.assert_allclose(found, expected[::-1], atol=1e-4)
    average = np.array(
        [values.log_weights(int(s), np.array([i]))[0] for s, i in zip(texts.states[0], texts.ids[0], strict=True)]
    )
    assert np.abs(found - average).max() > 0.05  # and not those of other contexts


def test_rare_patterns_are_raised_more(problem):
    statistics = problem[-1]
    automaton = TokenAutomaton(demo_tokenizer(), (Pattern("a*"), Pattern("zebra")), statistics.automaton.vocab_size)
    one = Statistics(automaton)
    one.add(np.array([automaton.start]), torch.full((1, automaton.vocab_size), 1 / automaton.vocab_size))
    target = PhraseTarget(tuple(PhraseGoal(p.text, (p,), Wanted(0)) for p in automaton.patterns))
    often, seldom = enriching(one, target)
    assert 0 == often < seldom
