"""g and w against every continuation, written out."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.tokens.test_patterns import demo_tokenizer
from xfactor_peft.phrases.goals import PhraseGoal, PhraseTarget, Wanted
from xfactor_peft.phrases.solving import solve
from xfactor_peft.phrases.values import Statistics, Values
from xfactor_peft.tokens.automaton import TokenAutomaton
from xfactor_peft.tokens.patterns import phrases

LETTERS = " abc"
RARE = 0.004


class Chain:
    """A vocabulary of four characters whose next one depends on the automaton's state alone.

    Occurrences begin seldom, as in real texts, and what has begun goes on with any probability. All of the tilted
    chain is known: h, the weight of all that follows, is its leading eigenvector, and h makes q (Doob 1957).
    """

    def __init__(self, lines, seed=0):
        tokenizer = demo_tokenizer()
        self.automaton = TokenAutomaton(tokenizer, phrases(lines), len(tokenizer))
        wanted = {letter.encode(): i for i, letter in enumerate(LETTERS)}
        self.ids = sorted((i for i, raw in self.automaton.bytes.items() if raw in wanted))
        spelt = [self.automaton.bytes[i].decode() for i in self.ids]
        generator = torch.Generator().manual_seed(seed)
        self.p, self.steps, waiting = {}, {}, [self.automaton.start]
        while waiting:
            state = waiting.pop()
            if state not in self.p:
                chances = torch.tensor([RARE if letter in "ac" else 0.5 for letter in spelt])
                going_on = np.isin(self.ids, self.automaton.row(state).ids)
                if self.automaton.automaton.inside(state):
                    chances[going_on] = torch.rand(int(going_on.sum()), generator=generator) + 0.05
                self.p[state] = (chances / chances.sum()).double().numpy()
                self.steps[state] = [self.automaton.step(state, i) for i in self.ids]
                waiting += [after for after, _ in self.steps[state]]
        self.states = list(self.p)
        self.place = {state: n for n, state in enumerate(self.states)}
        self.statistics = Statistics(self.automaton)
        visits = self.visited(np.stack([self.p[s] for s in self.states]))
        for state, count in zip(self.states, 1e9 * visits, strict=True):
            row = torch.zeros(self.automaton.vocab_size, dtype=torch.float64)
            row[self.ids] = torch.from_numpy(self.p[state])
            self.statistics.add(np.array([state]), count * row[None])
            seen = self.statistics.visits[state]
            seen.count = seen.natural = count

    def after(self):
        """Numbers of the states that follow, (S, 4)."""
        return np.array([[self.place[after] for after, _ in self.steps[s]] for s in self.states])

    def factors(self, strengths):
        """exp(lambda count) of every step, (S, 4)."""
        counted = [[sum(strengths[k] for k in ended) for _, ended in self.steps[s]] for s in self.states]
        return np.exp(np.array(counted))

    def ahead(self, strengths):
        """h of every state, over that of the start."""
        weights, after = np.stack([self.p[s] for s in self.states]) * self.factors(strengths), self.after()
        h = np.ones(len(self.states))
        for _ in range(2000):
            h = (weights * h[after]).sum(1)
            h /= h[self.place[self.automaton.start]]
        return h

    def tilted(self, strengths):
        """q of every state, (S, 4)."""
        q = np.stack([self.p[s] for s in self.states]) * self.factors(strengths) * self.ahead(strengths)[self.after()]
        return q / q.sum(1, keepdims=True)

    def visited(self, q):
        """How often each state is met in a long text, (S,)."""
        after, share = self.after(), np.full(len(self.states), 1 / len(self.states))
        for _ in range(5000):
            share = np.bincount(after.ravel(), (share[:, None] * q).ravel(), len(share))
        return share

    def rates(self, strengths, patterns):
        """Occurrences of every pattern per token of a long text of q, (K,)."""
        q = self.tilted(strengths)
        flow, found = self.visited(q)[:, None] * q, np.zeros(patterns)
        for n, state in enumerate(self.states):
            for i, (_, ended) in enumerate(self.steps[state]):
                for k in ended:
                    found[k] += flow[n, i]
        return found


@pytest.fixture(scope="module")
def chain():
    return Chain(["ab", "a ca", "*ca"])


@pytest.mark.parametrize("strength", [-20.0, -1.0, 0.7])
def test_worth_is_the_weight_of_all_that_follows(chain, strength):
    strengths = np.array([strength, strength / 2, strength / 3])
    values, h = Values(chain.statistics, strengths), chain.ahead(strengths)
    np.testing.assert_allclose(values.worth(np.array(chain.states)), h, rtol=0.02)
    assert np.abs(h - 1).max() > 0.2


def test_never_is_the_base_given_that_nothing_is_completed(chain):
    values, q = Values(chain.statistics, np.full(3, -np.inf)), chain.tilted(np.full(3, -50.0))
    for n, state in enumerate(chain.states):
        given = chain.p[state] * np.exp(values.log_weights(state, np.array(chain.ids)))
        np.testing.assert_allclose(given / given.sum(), q[n], atol=0.01)
        assert np.abs(chain.p[state] - q[n]).max() > 0.01 or not chain.automaton.automaton.inside(state)


@pytest.mark.parametrize("strength", [0.0, -1.0, 0.7])
def test_counts_are_those_of_a_long_text(chain, strength):
    strengths = np.array([strength, strength / 2, strength / 3])
    expected = chain.rates(strengths, 3)
    rtol = 1e-4 if strength == 0 else 0.03
    np.testing.assert_allclose(Values(chain.statistics, strengths).counts(np.eye(3)), expected, rtol=rtol)
    assert expected.min() > 1e-6


def test_strengths_give_the_wanted_rates():
    chain = Chain(["ab", "a ca"], seed=3)
    parts = chain.automaton.patterns
    target = PhraseTarget(
        tuple(PhraseGoal(p.text, (p,), w) for p, w in zip(parts, (Wanted(0.5), Wanted(0)), strict=True))
    )
    solved = solve(chain.statistics, target, 0.75)
    assert solved.given[0] == pytest.approx(0.5 * solved.base[0], rel=0.01)
    assert solved.given[1] < 1e-6 < solved.base[1]
    assert solved.strengths[0] < 0


def test_log_weights_of_some_tokens_are_those_of_all(chain):
    values = Values(chain.statistics, np.array([-2.0, -1.0, 1.0]))
    every = np.arange(chain.automaton.vocab_size)
    for state in chain.states:
        whole = values.log_weights(state, every)
        for i, (_, ended) in ((i, chain.automaton.step(state, i)) for i in itertools.islice(chain.ids, 4)):
            weight = values.factor(ended) * values.worth(np.array([chain.automaton.step(state, i)[0]]))[0]
            assert whole[i] == pytest.approx(math.log(weight), abs=1e-4)
        np.testing.assert_array_equal(values.log_weights(state, np.array(chain.ids)), whole[chain.ids])
        assert len(values.log_weights(state, every[:0])) == 0


def test_adding_to_logits_is_adding_the_weights(chain):
    """From every state, also one from which all tokens lead where they do with nothing under way (amid a character)."""
    values = Values(chain.statistics, np.array([-2.0, -1.0, 1.0]))
    amid = chain.automaton.automaton.step(chain.automaton.start, 0xE2)[0]
    states = np.array([*chain.states, amid, chain.states[-1]])
    z = torch.zeros(len(states), chain.automaton.vocab_size)
    values.add_to(z, z[:, :1], states)
    every = np.arange(chain.automaton.vocab_size)
    for row, state in zip(z.numpy(), states.tolist(), strict=True):
        np.testing.assert_allclose(row, values.log_weights(state, every), atol=1e-6)
