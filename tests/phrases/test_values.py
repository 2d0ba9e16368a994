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


class Chain:
    """A vocabulary of four characters whose next one depends on the automaton's state alone."""

    def __init__(self, lines, seed=0):
        tokenizer = demo_tokenizer()
        self.automaton = TokenAutomaton(tokenizer, phrases(lines), len(tokenizer))
        wanted = {letter.encode(): i for i, letter in enumerate(LETTERS)}
        self.ids = [i for i, raw in self.automaton.bytes.items() if raw in wanted]
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: dict[int, torch.Tensor] = {}
        self.statistics = Statistics(self.automaton)
        waiting = [self.automaton.start]
        while waiting:
            state = waiting.pop()
            if state not in self.rows:
                p = torch.zeros(self.automaton.vocab_size)
                p[self.ids] = torch.rand(len(self.ids), generator=self.generator).softmax(0)
                self.rows[state] = p
                self.statistics.add(np.full(100_000, state), p.expand(100_000, -1))
                waiting += [self.automaton.step(state, i)[0] for i in self.ids]

    def following(self, state):
        return [(float(self.rows[state][i]), i, *self.automaton.step(state, i)) for i in self.ids]

    def worth(self, state, strengths, depth=12):
        """E[exp(lambda count)] of what the occurrences under way become: every continuation, until none is."""
        if not self.automaton.automaton.inside(state) or not depth:
            return 1.0
        return sum(
            p * math.exp(sum(strengths[k] for k in ended)) * self.worth(after, strengths, depth - 1)
            for p, _, after, ended in self.following(state)
        )


@pytest.fixture(scope="module")
def chain():
    return Chain(["ab", "a ca", "*ca"])


@pytest.mark.parametrize("strength", [-20.0, -1.0, 0.7])
def test_worth_is_the_mean_over_all_continuations(chain, strength):
    strengths = np.array([strength, strength / 2, strength / 3])
    values = Values(chain.statistics, strengths)
    for state in chain.rows:
        assert values.worth(np.array([state]))[0] == pytest.approx(chain.worth(state, strengths), rel=1e-3)
    assert any(values.worth(np.array(list(chain.rows))) < 0.95) or strength > 0


def test_never_is_the_base_given_that_nothing_under_way_is_completed(chain):
    """By rejection: q(i) is proportional to p(i) times the chance that what is then under way comes to nothing."""
    values = Values(chain.statistics, np.full(3, -np.inf))
    for state in list(chain.rows)[:6]:
        kept = {
            i: p * (not ended) * chain.worth(after, np.full(3, -50.0)) for p, i, after, ended in chain.following(state)
        }
        log_w = values.log_weights(state, np.array(chain.ids))
        q = np.array([float(chain.rows[state][i]) for i in chain.ids]) * np.exp(log_w)
        expected = np.array([kept[i] for i in chain.ids])
        if expected.sum() > 1e-6:
            np.testing.assert_allclose(q / q.sum(), expected / expected.sum(), atol=2e-4)


def test_counts_are_those_of_a_long_text(chain):
    values = Values(chain.statistics, np.zeros(3))
    generator = torch.Generator().manual_seed(1)
    state, found, free = chain.automaton.start, np.zeros(3), 0
    tables = {s: (row[chain.ids].cumsum(0), chain.following(s)) for s, row in chain.rows.items()}
    visits = dict.fromkeys(chain.rows, 0)
    length = 30_000
    for u in torch.rand(length, generator=generator):
        cumulative, following = tables[state]
        visits[state] += 1
        _, _, state, ended = following[min(3, int((cumulative < u * cumulative[-1]).sum()))]
        free += 1
        for k in ended:
            found[k] += 1
    for s, count in visits.items():  # how often each state is met belongs to the text, not to the fixture
        seen = chain.statistics.visits[s]
        seen.masses, seen.no_word, seen.count = (
            seen.masses / seen.count * count,
            seen.no_word / seen.count * count,
            count,
        )
    starts = sum(n for s, n in visits.items() if not chain.automaton.automaton.inside(s))
    expected = values.counts(np.eye(3)) * starts
    assert found[0] > 100
    np.testing.assert_allclose(expected, found, rtol=0.2, atol=30)


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
    for state in chain.rows:
        whole = values.log_weights(state, every)
        for i, (_, ended) in ((i, chain.automaton.step(state, i)) for i in itertools.islice(chain.ids, 4)):
            weight = values.factor(ended) * values.worth(np.array([chain.automaton.step(state, i)[0]]))[0]
            assert whole[i] == pytest.approx(math.log(weight), abs=1e-4)
        np.testing.assert_array_equal(values.log_weights(state, np.array(chain.ids)), whole[chain.ids])
