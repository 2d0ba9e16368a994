"""Scores of an adapted model on its own samples: R, set mass, KL from the base, perplexity, variety."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .generation import DEFAULT_PROMPTS, SamplingOptions, Sequences, sample_sequences
from .head import SplitModel
from .losses import chunk_positions
from .tokens import TokenSet


@dataclass(frozen=True)
class EvalOptions:
    """Which prompts, how often, and how to sample."""

    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    repeats: int = 4
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


@dataclass(frozen=True)
class Evaluation:
    """Scores over N sampled sequences of L tokens each.

    Attributes:
        rate: R, the share of generated tokens that are in the set.
        interval: 95 % interval of R, by bootstrap over sequences.
        set_mass: mean probability that the model gives to the set at the generated positions.
        kl_from_base: mean KL(model || base) per generated token, nats, over the full vocabulary.
        perplexity: exp of the mean negative log-likelihood of the samples under the base.
        distinct_2: distinct bigrams / bigrams over all samples (Li et al. 2016).
        distinct_set_tokens: how many different members of the set were generated.
        tokens: generated tokens in all.
        decoding: the sampling settings.
    """

    rate: float
    interval: tuple[float, float]
    set_mass: float
    kl_from_base: float
    perplexity: float
    distinct_2: float
    distinct_set_tokens: int
    tokens: int
    decoding: dict[str, Any]
    samples: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        return asdict(self)


def rate_per_sequence(continuations: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Share of set tokens in each row; (N, L) ids and (V,) bool -> (N,) float64."""
    return mask[continuations].double().mean(dim=1)


def bootstrap_interval(values: torch.Tensor, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (N,), resampling whole sequences (Efron 1979)."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[picks].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


def distinct_n(continuations: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams / n-grams over all rows; 0 when no row has n tokens."""
    grams = [tuple(row[i : i + n]) for row in continuations for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


@dataclass
class _Totals:
    kl: float = 0.0
    mass: float = 0.0
    base_nll: float = 0.0
    count: int = 0


@torch.no_grad()
def evaluate(
    policy: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: TokenSet,
    options: EvalOptions = EvalOptions(),
    *,
    base: SplitModel | None = None,
    adapter_off: Callable[[], AbstractContextManager] | None = None,
) -> Evaluation:
    """Sample from `policy` and score the samples.

    The base is either another model (`base`), or the policy's own weights inside `adapter_off()`
    (peft's `disable_adapter`), so that one model in memory is enough. With neither, the policy is the base.
    """
    mask = tokens.mask()
    totals, rates, rows, samples = _Totals(), [], [], []
    model = policy.model
    for batch in sample_sequences(model, tokenizer, options.prompts, options.sampling, repeats=options.repeats):
        rates.append(rate_per_sequence(batch.continuations, mask))
        rows += batch.continuations.tolist()
        samples.append(tokenizer.decode(batch.ids[0]))
        hidden = _generated_hidden(policy, batch)
        if base is not None:
            base_hidden = _generated_hidden(base, batch)
        elif adapter_off is not None:
            with adapter_off():
                base_hidden = _generated_hidden(policy, batch)
        else:
            base_hidden = hidden
        _accumulate(totals, policy, base or policy, hidden, base_hidden, batch.continuations, mask)
    rate = torch.cat(rates)
    found = {i for row in rows for i in row} & set(tokens.ids)
    return Evaluation(
        rate=float(rate.mean()),
        interval=bootstrap_interval(rate),
        set_mass=totals.mass / totals.count,
        kl_from_base=totals.kl / totals.count,
        perplexity=math.exp(min(700.0, totals.base_nll / totals.count)),
        distinct_2=distinct_n(rows),
        distinct_set_tokens=len(found),
        tokens=totals.count,
        decoding={**options.sampling.record(), "prompts": len(options.prompts), "repeats": options.repeats},
        samples=tuple(samples),
    )


def _generated_hidden(model: SplitModel, batch: Sequences) -> torch.Tensor:
    """Hidden states that predict the generated tokens, (N * L, D)."""
    hidden = model.hidden(batch.ids.to(model.weight.device))
    return hidden[:, batch.prompt_length - 1 : -1].flatten(0, 1)


def _accumulate(totals, policy, base, hidden, base_hidden, continuations, mask) -> None:
    """Add the chunks' sums of KL(policy || base), set mass and base negative log-likelihood."""
    device = policy.weight.device
    ids = continuations.flatten().to(device)
    mask = mask.to(device)
    step = chunk_positions(policy.weight.shape[0])
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        log_p = policy.logits(hidden[part]).float().log_softmax(-1)
        log_base = base.logits(base_hidden[part]).float().log_softmax(-1)
        p = log_p.exp()
        totals.kl += float((p * (log_p - log_base)).sum())
        totals.mass += float(p[:, mask].sum())
        totals.base_nll -= float(log_base.gather(1, ids[part, None]).sum())
    totals.count += len(hidden)
