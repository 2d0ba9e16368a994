"""What a state of the automaton is worth: the expected weight of what the occurrence under way becomes.

The wanted texts are  p*(x) proportional to p(x) exp(sum_k lambda_k count_k(x)).  With f(c) = exp(sum_k lambda_k c_k)
and delta(s, i) the state after token i, its next token is

    q(i | context) proportional to p(i | context) w(s, i),        w(s, i) = f(c(s, i)) g(delta(s, i)),
    g(s) = E[ f(all that the occurrences under way in s will count) ] = 1 + sum over R(s) of p(i | s) (w(s, i) - 1),

R(s) the tokens that do not lead where they would with nothing under way: the others begin something new as often after
s as elsewhere, which is no property of s. With nothing under way, g = 1.

p(i | s), the base's probabilities averaged over contexts in which it was in s, is counted along its own texts, the
whole distribution at every visit rather than the token drawn. A state that was hardly visited is worth what states
that lack as many characters are worth on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..objective.tilt import SUPPRESS
from ..tokens.automaton import TokenAutomaton, places_in

SWEEPS = 8
"""Of the recursion; an occurrence under way has seldom more tokens left."""
PRIOR = 0.05
"""Visits that a guess counts as: who is inside a word that goes on in one way only must not think that it may not."""
WORD_ENDS = 0.9999
"""How likely a whole word is no part of a longer one."""
LACKING = 24
"""Characters that are told apart."""


@dataclass
class Visits:
    """Of one state: how often, and the summed probabilities of its row's ids and of tokens that begin no word.

    `natural` is how many of `count` are visits of the base's own texts.
    """

    natural: float
    count: float
    masses: np.ndarray
    no_word: float


class Statistics:
    """The base's probabilities by state of the automaton. With nothing under way, of every token.

    Attributes:
        anew: for either state of reference, the summed probabilities (V,) of tokens that do there, in the midst of an
            occurrence, what they do with nothing under way.
    """

    def __init__(self, automaton: TokenAutomaton) -> None:
        self.automaton = automaton
        self.visits: dict[int, Visits] = {}
        self.anew: dict[int, np.ndarray] = {}
        self._no_word = np.flatnonzero(~automaton.begins_word)

    def add(self, states: np.ndarray, p: torch.Tensor, *, tilted: bool = False) -> None:
        """Probabilities (n, V) of the token that follows in each of the states (n,).

        Texts of a tilted base (`tilted`) are in the midst of occurrences more often, and say no more than how these go
        on.
        """
        for state in np.unique(states):
            if tilted and not self.automaton.automaton.inside(int(state)):
                continue
            rows = torch.from_numpy(np.flatnonzero(states == state))
            row = self.automaton.row(int(state))
            mass = p[rows].sum(0).double().cpu().numpy()
            seen = self.visits.setdefault(int(state), Visits(0.0, 0.0, np.zeros(len(row.ids)), 0.0))
            seen.natural += 0 if tilted else len(rows)
            seen.count += len(rows)
            seen.masses += mass[row.ids]
            if row.reference is None:
                continue
            mass[row.ids] = 0.0
            if not tilted:
                self.anew.setdefault(row.reference, np.zeros(len(mass)))[:] += mass
            if row.waiting:
                seen.no_word += mass[self._no_word].sum()


class Values:
    """g and w for given strengths.

    Args:
        strengths: lambda of every pattern, (K,); minus infinity for never.
    """

    _known: np.ndarray

    def __init__(self, statistics: Statistics, strengths: np.ndarray) -> None:
        self.statistics, self.automaton = statistics, statistics.automaton
        self.strengths = np.maximum(strengths, SUPPRESS)
        for state in (self.automaton.start, self.automaton.automaton.inside_word, *statistics.visits):
            self.automaton.row(state)  # so that `endings` is whole
        self._g = self._solved()
        self._dense: dict[int, np.ndarray] = {}

    def factor(self, ended: Sequence[int]) -> float:
        """f of patterns that end together."""
        return float(np.exp(max(SUPPRESS, sum(self.strengths[k] for k in ended))))

    def row(self, state: int) -> tuple[np.ndarray, float]:
        """(w of the row's ids, f of what ends with every other token that begins no word)."""
        row = self.automaton.row(state)
        return self._factors()[row.ended] * self.worth(row.following), self.factor(row.waiting)

    def worth(self, states: np.ndarray) -> np.ndarray:
        """g of states."""
        size = len(self.automaton.automaton)
        if len(self._g) < size:
            self._g = np.concatenate([self._g, np.array([self._guess(s) for s in range(len(self._g), size)])])
        return self._g[states]

    def log_weights(self, state: int, ids: np.ndarray) -> np.ndarray:
        """log w(state, i) for sorted ids, float32."""
        row, out = self.automaton.row(state), np.zeros(len(ids), np.float32)
        if row.reference is not None:
            out += self.log_weights(row.reference, ids)
            if row.waiting:
                out[~self.automaton.begins_word[ids]] += np.log(self.factor(row.waiting))
        place, hit = places_in(ids, row.ids)
        out[place[hit]] = np.log(np.maximum(self.row(state)[0][hit], np.exp(SUPPRESS)))
        return np.maximum(out, SUPPRESS)

    def add_to(self, z: torch.Tensor, hidden: torch.Tensor, states: np.ndarray) -> None:
        """log w in place: texts drawn from the teacher (a `texts.Tilt`)."""
        for state in np.unique(states):
            rows, row = torch.from_numpy(np.flatnonzero(states == state)).to(z.device), self.automaton.row(int(state))
            reference = int(state) if row.reference is None else row.reference
            whole = self._dense.setdefault(reference, self.log_weights(reference, np.arange(z.shape[1])))
            if state != reference:
                whole = whole.copy()
                if row.waiting:
                    whole[~self.automaton.begins_word] += np.log(self.factor(row.waiting))
                whole[row.ids] = self.log_weights(int(state), row.ids)
            z[rows] += torch.from_numpy(whole).to(z)

    def counts(self, goals: np.ndarray) -> np.ndarray:
        """Rates of goals per token in texts of q, (G,), as the states' averages have it; `goals` (K, G) says which
        patterns count for which.

        n(s), what the occurrences under way will count: sum over R(s) of p(i|s) w(s, i) (c(s, i) + n(delta)) / g(s).
        The way into a state under way is taken g(s) times as often as by the base.
        """
        per_ending = np.array([goals[list(e)].sum(0) for e in self.automaton.endings])
        n = self._counted_ahead(goals, per_ending)
        rates, tokens, inside = np.zeros(goals.shape[1]), 0.0, self.automaton.automaton.inside
        for state, seen in self.statistics.visits.items():
            if inside(state):
                tokens += seen.natural * self._g[state]
            else:
                tokens += seen.natural
                found, total = self._flow(state, seen, n, goals, per_ending)
                rates += seen.natural * found / total
        for reference, anew in self.statistics.anew.items():
            row, (w, _) = self.automaton.row(reference), self.row(reference)
            rates += (anew[row.ids] * w) @ (per_ending[row.ended] + n[row.following])
        return rates / max(1.0, tokens)

    def _counted_ahead(self, goals: np.ndarray, per_ending: np.ndarray) -> np.ndarray:
        """n of every state, (states, G)."""
        automaton = self.automaton.automaton
        n = np.zeros((len(automaton), goals.shape[1]))
        for state in filter(automaton.inside, range(len(automaton))):
            pattern = automaton.nearest(state)
            chance = self._chance[min(LACKING, automaton.left(state))] * self.factor((pattern,))
            n[state] = goals[pattern] * min(1.0, chance / self._g[state])
        for _ in range(SWEEPS):
            for state, seen in self._order:
                found, total = self._flow(state, seen, n, goals, per_ending)
                n[state] = found / total
        return n

    def _flow(
        self, state: int, seen: Visits, n: np.ndarray, goals: np.ndarray, per_ending: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """(what R(s) will count, (G,), not yet divided by the other: the sum of p w over all tokens)."""
        row, (w, waiting) = self.automaton.row(state), self.row(state)
        p, no_word = seen.masses / seen.count, seen.no_word / seen.count
        found = (p * w) @ (per_ending[row.ended] + n[row.following])
        found += no_word * waiting * goals[list(row.waiting)].sum(0)
        return found, max(1e-9, 1 + float((p * (w - 1)).sum()) + no_word * (waiting - 1))

    @cached_property
    def _order(self) -> list[tuple[int, Visits]]:
        """Visited states with an occurrence under way, those that lack least first."""
        inside = [(s, v) for s, v in self.statistics.visits.items() if self.automaton.automaton.inside(s)]
        return sorted(inside, key=lambda item: self.automaton.automaton.left(item[0]))

    def _factors(self) -> np.ndarray:
        """f of every number of `TokenAutomaton.endings`; those that no row has yet are not computed again."""
        known, endings = len(self._known), self.automaton.endings
        if known < len(endings):
            self._known = np.concatenate([self._known, [self.factor(ended) for ended in endings[known:]]])
        return self._known

    def _solved(self) -> np.ndarray:
        never = np.full_like(self.strengths, SUPPRESS)
        self._chance = np.full(LACKING + 1, np.nan)
        strengths = self.strengths
        self._use(never)
        completes = 1 - self._swept(prior=0.0)
        weights, totals = np.zeros(LACKING + 1), np.zeros(LACKING + 1)
        for state, seen in self._order:
            place = min(LACKING, self.automaton.automaton.left(state))
            weights[place] += np.sqrt(seen.count)
            totals[place] += np.sqrt(seen.count) * completes[state]
        self._chance = (totals + 0.9 * np.exp(-np.arange(LACKING + 1) / 3)) / (weights + 1)
        self._use(strengths)
        return self._swept(prior=PRIOR)

    def _use(self, strengths: np.ndarray) -> None:
        self.strengths, self._known = strengths, np.zeros(0)

    def _guess(self, state: int) -> float:
        """g of a state by the characters that it lacks."""
        automaton = self.automaton.automaton
        if not automaton.inside(state):
            return 1.0
        left = automaton.left(state)
        chance = self._chance[min(LACKING, left)] if left else WORD_ENDS
        chance = 0.5 if np.isnan(chance) else chance
        return 1 + chance * (self.factor((automaton.nearest(state),)) - 1)

    def _swept(self, prior: float) -> np.ndarray:
        """g of every state by the recursion; a guess counts as `prior` visits."""
        self._g = np.array([self._guess(state) for state in range(len(self.automaton.automaton))])
        guesses, factors = self._g.copy(), self._factors()
        for _ in range(SWEEPS):
            for state, seen in self._order:
                row = self.automaton.row(state)
                lost = (seen.masses * (1 - factors[row.ended] * self._g[row.following])).sum()
                lost += seen.no_word * (1 - self.factor(row.waiting))
                self._g[state] = (seen.count - lost + prior * guesses[state]) / (seen.count + prior)
        return self._g
