"""How patterns go on that the base's texts hardly hold: they are written into its texts, where they would come.

" casc" goes on as "cascading" nearly always, and who does not know that makes "cascading" impossible after " casc" and
leaves a text there that knows no way on. A few contexts are enough to know, if they are those in which the base would
have begun so: a place is drawn in proportion to the probability of the pattern's first token there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..base.split_model import SplitModel
from ..objective.kl import chunk_positions
from .along import probabilities
from .texts import Texts
from .values import Statistics

ENOUGH = 3
"""Visits of a state that say enough of how it goes on."""
CONTEXT, CONTEXTS = 24, 4
"""Tokens of a text that a spelling is written after, and how many such places it is written into."""
MOST, AT_ONCE = 2000, 32
"""Spellings that are written at most, and at the same time."""

Probe = tuple[list[int], list[int]]
"""Ids, and the states before the tokens that follow each of the last of them."""


def probe(
    policy: SplitModel, tokenizer: PreTrainedTokenizerBase, statistics: Statistics, texts: Texts, seed: int
) -> int:
    """Add to the statistics what the base gives amid patterns that its texts hardly hold; how many were written."""
    probes = sorted(_probes(policy, tokenizer, statistics, texts, seed), key=lambda one: len(one[0]))[:MOST]
    for first in range(0, len(probes), AT_ONCE):
        _look(policy, statistics, probes[first : first + AT_ONCE])
    return len(probes)


def _probes(
    policy: SplitModel, tokenizer: PreTrainedTokenizerBase, statistics: Statistics, texts: Texts, seed: int
) -> Iterator[Probe]:
    automaton, generator = statistics.automaton, torch.Generator().manual_seed(seed)
    free = np.array([not automaton.automaton.inside(state) for state in range(len(automaton.automaton))])
    rows, ends = np.nonzero(free[texts.states] & (np.arange(texts.states.shape[1]) >= CONTEXT))
    for ids in _spellings(tokenizer, statistics) if len(rows) else ():
        p = torch.from_numpy(probabilities(policy, texts, (rows, ends), np.array(ids[:1]))[:, 0])
        for place in torch.multinomial(p, CONTEXTS, replacement=True, generator=generator).tolist():
            row, end = int(rows[place]), int(ends[place])
            states = automaton.run(ids, int(texts.states[row, end]))[0][1:]
            yield [*texts.ids[row, end - CONTEXT : end].tolist(), *ids], states


def _spellings(tokenizer: PreTrainedTokenizerBase, statistics: Statistics) -> Iterator[list[int]]:
    """Ids of patterns, as they are spelt amid a line and at its start, that lead to states with too few visits."""
    automaton = statistics.automaton
    for pattern in automaton.patterns:
        capital = pattern.body[:1].upper() + pattern.body[1:]
        for text in dict.fromkeys((f" {pattern.body}", f" {capital}", capital)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            states = automaton.run(ids)[0][1:]
            if any(automaton.automaton.inside(s) and _visits(statistics, s) < ENOUGH for s in states):
                yield ids


def _visits(statistics: Statistics, state: int) -> float:
    seen = statistics.visits.get(state)
    return seen.count if seen else 0.0


@torch.no_grad()
def _look(policy: SplitModel, statistics: Statistics, probes: list[Probe]) -> None:
    padded = pad_sequence([torch.tensor(ids) for ids, _ in probes], batch_first=True)
    hidden = policy.hidden(padded.to(policy.weight.device))
    parts = [row[len(ids) - len(states) : len(ids)] for row, (ids, states) in zip(hidden, probes, strict=True)]
    flat, every = torch.cat(parts), torch.tensor([state for _, states in probes for state in states])
    for rows in torch.arange(len(flat)).split(chunk_positions(len(policy.weight))):
        statistics.add(every[rows].numpy(), policy.logits(flat[rows]).float().softmax(1), tilted=True)
