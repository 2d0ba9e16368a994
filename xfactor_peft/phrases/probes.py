"""How patterns go on that the base's texts hardly hold: they are written into its texts, as far as needs be.

" casc" goes on as "cascading" nearly always, and who does not know that makes "cascading" impossible after " casc" and
leaves a text there that knows no way on. A few contexts are enough to know.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..base.split_model import SplitModel
from ..objective.kl import chunk_positions
from .texts import Texts
from .values import Statistics

ENOUGH = 3
"""Visits of a state that say enough of how it goes on."""
CONTEXT, CONTEXTS = 16, 3
"""Tokens of a text that a spelling is written after, and how many such places it is written into."""
MOST, AT_ONCE = 2000, 32
"""Spellings that are written at most, and at the same time."""

Probe = tuple[list[int], list[int]]
"""Ids, and the states before the tokens that follow each of the last of them."""


def probe(
    policy: SplitModel, tokenizer: PreTrainedTokenizerBase, statistics: Statistics, texts: Texts, seed: int
) -> int:
    """Add to the statistics what the base gives amid patterns that its texts hardly hold; how many were written."""
    probes = sorted(_probes(tokenizer, statistics, texts, seed), key=lambda one: len(one[0]))[:MOST]
    for first in range(0, len(probes), AT_ONCE):
        _look(policy, statistics, probes[first : first + AT_ONCE])
    return len(probes)


def _probes(tokenizer: PreTrainedTokenizerBase, statistics: Statistics, texts: Texts, seed: int) -> Iterator[Probe]:
    automaton, generator = statistics.automaton, torch.Generator().manual_seed(seed)
    places = [place for place in _places(statistics, texts)]
    for pattern in automaton.patterns if places else ():
        for text in {f" {pattern.body}", f" {pattern.body[:1].upper()}{pattern.body[1:]}"}:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            states = automaton.run(ids, automaton.automaton.inside_word)[0][1:-1]
            rare = [s for s in states if automaton.automaton.inside(s) and _visits(statistics, s) < ENOUGH]
            for _ in range(CONTEXTS if rare else 0):
                row, end = places[int(torch.randint(len(places), (), generator=generator))]
                context = texts.ids[row, max(0, end - CONTEXT) : end].tolist()
                yield [*context, *ids[:-1]], states


def _places(statistics: Statistics, texts: Texts) -> Iterator[tuple[int, int]]:
    """(text, token) where a text begins a new word with nothing under way."""
    automaton = statistics.automaton
    for row, (ids, states) in enumerate(zip(texts.ids.tolist(), texts.states.tolist(), strict=True)):
        for place in range(CONTEXT, len(ids)):
            if states[place] == automaton.automaton.inside_word and automaton.bytes.get(ids[place], b"")[:1] == b" ":
                yield row, place


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
