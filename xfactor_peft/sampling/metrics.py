"""Scores of an adapted model on its own samples: R, set mass, KL from the base, perplexity, variety."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from ..base.split_model import SplitModel
from ..lora.wrap import adapts_trunk
from ..options import EvalOptions
from ..tokens.ends import special_ids
from ..tokens.token_set import TokenSet
from .generation import encode_prompt
from .intervals import mean_interval, rate_interval
from .position_scores import PositionScores, score_positions
from .sampler import Samples, sample

POSITIONS = 256
"""Tokens that go through the trunk together when texts are scored, as many as in a usual step of training: buffers of
quantised layers, and the float32 copies that PEFT makes of its inputs, grow with them."""


@dataclass(frozen=True)
class Evaluation:
    """Scores over N sampled sequences of L tokens each.

    Attributes:
        rate: R, the share of generated tokens that are in the set.
        interval: 95 % interval of R (`intervals.rate_interval`).
        set_mass: mean probability that the model gives to the set at the generated positions.
        kl_from_base: mean KL(model || base) per generated token, nats, over the full vocabulary.
        kl_interval: 95 % interval of it, by bootstrap over texts (`intervals.mean_interval`).
        kl_parts: its mass, inside-set and outside-set parts, which add up to it (see `PositionScores`), and
            "outside_conditional", the mean KL of the distributions without the set.
        spread: standard deviation of R between texts.
        goals: for every set of several goals, its rule, R, interval and spread.
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
    kl_interval: tuple[float, float] = (0.0, 0.0)
    kl_parts: dict[str, float] = field(default_factory=dict)
    spread: float = 0.0
    goals: tuple[dict[str, Any], ...] = ()

    def record(self) -> dict[str, Any]:
        return asdict(self)


def rate_per_sequence(continuations: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Share of set tokens in each row; (N, L) ids and (V,) bool -> (N,) float64."""
    return mask[continuations].double().mean(dim=1)


def distinct_n(continuations: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams / n-grams over all rows; 0 when no row has n tokens."""
    grams = [tuple(row[i : i + n]) for row in continuations for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def evaluate(
    policy: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: TokenSet,
    options: EvalOptions = EvalOptions(),
    *,
    base: SplitModel | None = None,
    adapter_off: Callable[[], AbstractContextManager] | None = None,
    goals: Sequence[TokenSet] = (),
) -> Evaluation:
    """Sample from `policy` and score the samples; the rates of `goals` are reported, too.

    The base is either another model (`base`), or the policy's own weights inside `adapter_off()`
    (peft's `disable_adapter`), so that one model in memory is enough. With neither, the policy is the base.
    """
    pair, parts, batches = _Pair(policy, base, adapter_off), [], []
    texts: dict[tuple[int, ...], list[int]] = {}  # of every prompt one
    new = options.sampling.max_new_tokens
    encoded = [encode_prompt(tokenizer, policy.model, prompt, new) for prompt in options.prompts]
    prompts = [ids for ids in encoded for _ in range(options.repeats)]
    for batch in sample(policy, prompts, options.sampling, special_ids(tokenizer, policy.model)):
        batches.append(batch.continuations)
        for row, start in zip(batch.ids.tolist(), batch.starts.tolist(), strict=True):
            texts.setdefault(tuple(row[:start]), row[: start + new])
        parts += [pair.score(part, tokens.mask()) for part in batch.split(POSITIONS)]
    samples = [cast(str, tokenizer.decode(texts[tuple(ids)])) for ids in encoded]
    rows, scores = torch.cat(batches), PositionScores.join(parts)
    rate = _rate(rows, tokens)
    kl = scores.kl.view(rows.shape)
    means = {name: float(getattr(scores, name).double().mean()) for name in ("kl_mass", "kl_inside", "kl_outside")}
    return Evaluation(
        **rate,
        set_mass=float(scores.mass.double().mean()),
        kl_from_base=float(kl.double().mean()),
        perplexity=math.exp(min(700.0, float(scores.base_nll.double().mean()))),
        distinct_2=distinct_n(rows.tolist()),
        distinct_set_tokens=len(set(rows.flatten().tolist()) & set(tokens.ids)),
        tokens=rows.numel(),
        decoding={
            **options.sampling.record(),
            "prompts": len(options.prompts),
            "prompt_texts": options.prompts,
            "repeats": options.repeats,
        },
        samples=tuple(samples),
        kl_interval=mean_interval(kl),
        kl_parts={
            **{name.removeprefix("kl_"): value for name, value in means.items()},
            "outside_conditional": float(scores.outside.double().mean()),
        },
        goals=tuple({"rule": goal.record()["rule"], **_rate(rows, goal)} for goal in goals),
    )


def _rate(rows: torch.Tensor, tokens: TokenSet) -> dict[str, Any]:
    rate = rate_per_sequence(rows, tokens.mask())
    length = rows.shape[1]
    return {
        "rate": float(rate.mean()),
        "interval": rate_interval((rate * length).round(), length),
        "spread": float(rate.std()) if len(rate) > 1 else 0.0,
    }


@dataclass(frozen=True)
class _Pair:
    """A policy and its base, which is another model, the policy without its adapter, or the policy itself."""

    policy: SplitModel
    base: SplitModel | None
    adapter_off: Callable[[], AbstractContextManager] | None

    def score(self, batch: Samples, mask: torch.Tensor) -> PositionScores:
        device = self.policy.weight.device
        plain = self.base or replace(self.policy, tilt=None)
        off = self.adapter_off or nullcontext
        hidden = base_hidden = batch.states
        if plain.model is not self.policy.model or (self.adapter_off and adapts_trunk(self.policy.model)):
            # The states of both are made the same way, so that no rounding of one way is taken for a difference.
            ids = batch.ids.to(device)
            hidden = batch.predicting(self.policy.hidden(ids))
            with off():
                base_hidden = batch.predicting(plain.hidden(ids))

        def base_logits(part: torch.Tensor) -> torch.Tensor:
            with off():
                return plain.logits(part)

        drawn, itself = batch.continuations.flatten().to(device), self.adapter_off is None and plain == self.policy
        return score_positions(
            self.policy, hidden.flatten(0, 1), base_hidden.flatten(0, 1), drawn, mask.to(device),
            None if itself else base_logits,
        )  # fmt: skip
