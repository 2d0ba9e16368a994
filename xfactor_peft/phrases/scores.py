"""What texts hold: rates with intervals, variety, and the words that came instead."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..base.split_model import SplitModel
from ..objective.kl import chunk_positions
from ..sampling.metrics import distinct_n
from ..tokens.automaton import TokenAutomaton
from .texts import Texts, states_of

TEXTS = 8
"""Texts at once where states are made of whole texts."""

_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(frozen=True)
class PhraseScores:
    """Of one model's texts.

    Attributes:
        per_1000_words: occurrences of all patterns; interval: 95 %, over texts (see `count_interval`).
        counts: of every pattern.
        kl: mean KL from the base at a token of its own texts, nats.
    """

    per_1000_words: float
    interval: tuple[float, float]
    counts: list[int]
    words: int
    tokens: int
    kl: float
    distinct_2: float

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def rate(self, patterns: Sequence[int]) -> float:
        """Occurrences of some of the patterns per 1,000 words."""
        return 1000 * sum(self.counts[k] for k in patterns) / max(1, self.words)


def decoded(tokenizer: PreTrainedTokenizerBase, texts: Texts) -> list[str]:
    """What was drawn, without the prompts."""
    return [cast(str, tokenizer.decode(row)) for row in texts.ids.tolist()]


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return [word.lower() for word in _WORD.findall(text)]


def score(tokenizer: PreTrainedTokenizerBase, automaton: TokenAutomaton, texts: Texts) -> PhraseScores:
    """Count everything."""
    counts = texts.counts(automaton)
    words = np.array([len(words_of(text)) for text in decoded(tokenizer, texts)])
    low, high = count_interval(counts.sum(1), int(words.sum()))
    return PhraseScores(
        per_1000_words=1000 * float(counts.sum()) / max(1, int(words.sum())),
        interval=(1000 * low, 1000 * high),
        counts=counts.sum(0).tolist(),
        words=int(words.sum()),
        tokens=texts.ids.numel(),
        kl=float(texts.kl.double().mean()),
        distinct_2=distinct_n(texts.ids.tolist()),
    )


@torch.no_grad()
def kl_from_base(policy: SplitModel, texts: Texts, adapter_off: Callable[[], AbstractContextManager]) -> torch.Tensor:
    """KL(model || base) at every drawn token of the model's own texts, (N, L), nats."""
    policy.model.eval()
    out = torch.empty(texts.ids.shape)
    for rows in torch.arange(len(texts.ids)).split(TEXTS):
        own = states_of(policy, texts, rows)
        with adapter_off():
            plain = states_of(policy, texts, rows)
        kl = []
        for part in torch.arange(len(own)).split(chunk_positions(len(policy.weight))):
            log_pi = policy.logits(own[part]).float().log_softmax(1)
            with adapter_off():
                log_p = policy.logits(plain[part]).float().log_softmax(1)
            kl.append((log_pi.exp() * (log_pi - log_p)).sum(1))
        out[rows] = torch.cat(kl).view(len(rows), -1).cpu()
    return out


def count_interval(counts: np.ndarray, exposure: float) -> tuple[float, float]:
    """95 % for a rate of occurrences per unit of `exposure`, from their counts in independent texts (N,).

    Occurrences come in clumps, so the Poisson interval (Garwood 1936, in Wilson and Hilferty's approximation of the
    gamma quantile) is taken for counts divided by their dispersion, variance / mean, where that is above 1.
    """
    total = float(counts.sum())
    dispersion = max(1.0, float(counts.var(ddof=1)) / (total / len(counts))) if total and len(counts) > 1 else 1.0
    unit = exposure / dispersion if exposure else 1.0
    k = total / dispersion
    return (gamma_quantile(k, -1.96) / unit if k else 0.0, gamma_quantile(k + 1, 1.96) / unit)


def gamma_quantile(shape: float, z: float) -> float:
    """The quantile of a gamma variable of scale 1 at a normal one (Wilson and Hilferty 1931)."""
    return shape * max(0.0, 1 - 1 / (9 * shape) + z / (3 * math.sqrt(shape))) ** 3


def risen(before: Sequence[str], after: Sequence[str], most: int = 20) -> list[tuple[str, int, int]]:
    """(word, count before, count after) of the words that rose most: by (a - b) / sqrt(a + b) at equal lengths."""
    first, second = (Counter(word for text in texts for word in words_of(text)) for texts in (before, after))
    scale = sum(second.values()) / max(1, sum(first.values()))
    surprise = {w: (n - first[w] * scale) / math.sqrt(n + first[w] * scale) for w, n in second.items()}
    return [
        (word, first[word], second[word]) for word in sorted(surprise, key=surprise.__getitem__, reverse=True)[:most]
    ]
