"""The set head that looks: fitted to the tilt that every piece of text needs, round by round on texts of its own.

The first contexts are texts of the base after the prompts of every family. Each later round is of texts that the head
fitted so far wrote, since a text with set tokens in it needs another tilt than one without. The mathematics is in
`objective.head_fit`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..base.final_norm import takes_logit_bias
from ..lora.set_head import SetHead
from ..objective.head_fit import Contexts, HeadFitter, price
from ..objective.tilt import solve_rates
from ..progress import phase
from ..sampling.calibration import Trace
from ..sampling.intervals import mean_interval
from ..sampling.own_samples import OwnSamples
from ..sampling.reweighting import log_odds

Drawn = Callable[[str, Callable[[], Any]], Any]
TEXTS = (16, 16, 16, 32)
"""Texts a family of every round, the base's first."""
MOST_SHIFT = 2.0
"""Log-odds by which the aim of a family moves at most for what top-k and top-p cut."""


@dataclass(frozen=True)
class HeadReport:
    """How the head was fitted, JSON-serialisable; F families, K sets.

    Where top-k or top-p cut tokens, the constants and the KL are of the distributions before the cut.

    Attributes:
        families: their names.
        rates: expected R (F, K) after the prompts of each, in the last round, before its correction.
        intervals: 95 % intervals of them.
        spreads: standard deviations between texts.
        strengths: lambda_f (F, K) of one constant a family with these rates, in the head's own contexts.
        constant: the one lambda (K,) with their mean.
        rates_of_constant: (F, K), with it.
        kl, kl_of_teacher, kl_of_constant: of the head and of these, in the same contexts, nats per token.
        offset: whether the head has a constant part b; without one its weights alone say it all, so it merges.
        rounds: the rates of every family and set in each.
        dial: pairs (scale, expected R) that are known of the first set, means over the families.
    """

    families: list[str]
    rates: list[list[float]]
    intervals: list[list[tuple[float, float]]]
    spreads: list[list[float]]
    strengths: list[list[float]]
    constant: list[float]
    rates_of_constant: list[list[float]]
    kl: float
    kl_of_teacher: float
    kl_of_constant: float
    offset: bool
    rounds: Trace
    dial: list[tuple[float, float]]

    @property
    def price(self) -> float:
        """The KL over that of the one constant."""
        return self.kl / self.kl_of_constant if self.kl_of_constant > 1e-9 else 1.0

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "price": self.price}


def fit_head(
    head: SetHead, own: OwnSamples, wanted: torch.Tensor, base_only: Callable[[], AbstractContextManager], drawn: Drawn
) -> HeadReport:
    """Fit `head`, which is at 0, to the rates (K,).

    Args:
        base_only: a context in which the model is the base.
        drawn: keeps what was sampled (see `RateRun.drawn`).

    Raises:
        XFactorError: no tilt of the base has these rates.
    """
    samples, offset = own.families, takes_logit_bias(own.base.model)
    temperature, atoms, rounds = samples.decoding.temperature, samples.atoms, Trace()
    fitter = HeadFitter(atoms, wanted.tolist(), intercept=offset)
    fitted = head.direction.detach().cpu(), head.offset.detach().cpu()
    for index, texts in enumerate(TEXTS):
        with phase(f"fitting the set head, round {index + 1} of {len(TEXTS)}"):
            seed = 7919 * (own.seed + 1) + 1000 + index
            contexts, rates = _contexts(drawn, f"round {index}", partial(samples.contexts, texts, seed, base_only))
            rounds.append({"rates": rates.mean(1).flatten().tolist()})
            if not index:  # rates that no tilt reaches are refused
                solve_rates(torch.cat([p.masses.flatten(0, 1) for p in contexts]), atoms.patterns, wanted.tolist())
            elif index + 1 == len(TEXTS):
                found = price(contexts, atoms, *fitted)  # of the head that wrote these texts
            if index and own.rate.cuts:
                fitter.aim(_aim(contexts, atoms.patterns, fitted, rates.mean(1), wanted))
            fitter.add(contexts)
            fitted = fitter.head()
            head.set(*(temperature * part for part in fitted))
    first = float(torch.tensor(rounds[0]["rates"])[:: len(wanted)].mean())
    return HeadReport(
        families=samples.names,
        rates=rates.mean(1).tolist(),
        intervals=[[mean_interval(texts[:, None]) for texts in family.T] for family in rates],
        spreads=rates.std(1).tolist(),
        strengths=(found.teacher * temperature).tolist(),
        constant=(found.constant * temperature).tolist(),
        rates_of_constant=found.rates_of_constant.tolist(),
        kl=found.kl,
        kl_of_teacher=found.kl_of_teacher,
        kl_of_constant=found.kl_of_constant,
        offset=offset,
        rounds=rounds,
        dial=[(0.0, first), (1.0, float(rates[..., 0].mean()))],
    )


def _aim(
    contexts: list[Contexts],
    patterns: torch.Tensor,
    head: tuple[torch.Tensor, torch.Tensor],
    cut: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Rates before top-k and top-p cut tokens, (F, K), with which those after the cut should be `wanted` (K,).

        logit aim_f = logit R + logit uncut_f - logit cut_f

    with the rates of the head that wrote these texts, before and after, `cut` (F, K).
    """
    uncut = torch.stack([(part.tilted(part.tilts(*head), patterns) @ patterns).mean(0) for part in contexts])
    shift = (log_odds(uncut) - log_odds(cut)).clamp(-MOST_SHIFT, MOST_SHIFT)
    return torch.where(wanted > 0, (log_odds(wanted) + shift).sigmoid(), 0.0)


def _contexts(
    drawn: Drawn, name: str, draw: Callable[[], tuple[list[Contexts], torch.Tensor]]
) -> tuple[list[Contexts], torch.Tensor]:
    """What `draw` gives, kept as plain tensors."""

    def plain() -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        found, rates = draw()
        return [(one.states, one.masses) for one in found], rates

    parts, rates = drawn(name, plain)
    return [Contexts(*part) for part in parts], rates


def restore_head(head: SetHead, facts: dict[str, Any]) -> HeadReport:
    """The inverse of `head_facts`."""
    head.set(torch.tensor(facts["direction"]), torch.tensor(facts["constant"]))
    return HeadReport(**facts["report"])


def head_facts(head: SetHead, report: HeadReport) -> dict[str, Any]:
    """What a checkpoint holds of a fitted head, JSON-serialisable."""
    tensors = {"direction": head.direction.tolist(), "constant": head.offset.tolist()}
    return {**tensors, "report": asdict(report)}
