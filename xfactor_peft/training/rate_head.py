"""The set head that looks: fitted to the tilt that every family of prompts needs, then calibrated on its own samples.

1. A few texts of the base after each family's prompts give a first lambda_f.
2. Texts of the base tilted by it, of every family, are the contexts that `objective.head_fit` fits heads in: from here
   on a head is a linear function of the F tilts that it is to give the families.
3. Rounds of texts of the head itself correct these tilts until every family holds its rate (`calibration.calibrate`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..base.final_norm import takes_logit_bias
from ..lora.set_head import SetHead
from ..objective.head_fit import Contexts, HeadFitter
from ..progress import phase
from ..sampling.calibration import Trace, calibrate, solve
from ..sampling.family_samples import FamilySamples
from ..sampling.intervals import mean_interval
from ..sampling.own_samples import OwnSamples
from ..sampling.reweighting import SLOPE, log_odds

Drawn = Callable[[str, Callable[[], Any]], Any]
PILOT_TEXTS, CONTEXT_TEXTS, TEXTS = 8, 24, (32, 80)
"""Texts a family in the three parts, in the last by rounds: the first brings it near, the second says how near."""
CAUTION = 0.8
"""Of the lambda that the base's own texts ask for: what raises a set in one place makes it likelier in those behind."""


@dataclass(frozen=True)
class HeadReport:
    """How the head was fitted, JSON-serialisable; F families, K sets.

    Attributes:
        families: their names.
        rates: expected R (F, K) after the prompts of each, in the last round, before its correction.
        intervals: 95 % intervals of them.
        strengths: lambda_f (F, K) of the teacher, which has one constant a family.
        constant: the one lambda (K,) that holds the rates on average.
        rates_of_constant: (F, K), with it.
        kl, kl_of_teacher, kl_of_constant: in the same contexts, nats per token.
        offset: whether the head has a constant part b; without one its weights alone say it all, so it merges.
        ridge: of the fit.
        rounds: of calibration; in each the mean tilt of every family (and set), and the expected rates.
        dial: pairs (scale, expected R) that are known of the first set, means over the families.
    """

    families: list[str]
    rates: list[list[float]]
    intervals: list[list[tuple[float, float]]]
    strengths: list[list[float]]
    constant: list[float]
    rates_of_constant: list[list[float]]
    kl: float
    kl_of_teacher: float
    kl_of_constant: float
    offset: bool
    ridge: float
    rounds: Trace
    dial: list[tuple[float, float]]

    @property
    def price(self) -> float:
        """The KL over that of the one constant."""
        return self.kl / self.kl_of_constant if self.kl_of_constant > 1e-9 else 1.0

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "price": self.price}


def fit_head(head: SetHead, own: OwnSamples, wanted: torch.Tensor, drawn: Drawn) -> HeadReport:
    """Fit `head`, which is at 0, to the rates (K,); `drawn` keeps what was sampled (see `RateRun.drawn`)."""
    samples = own.families
    temperature, rates = samples.decoding.temperature, wanted.tolist()
    offset = takes_logit_bias(own.base.model)
    with phase("first texts after prompts of every family"):
        none = torch.zeros(len(samples.names), len(wanted))
        pilots, silent = _contexts(drawn, "pilots", samples, PILOT_TEXTS, _seed(own, 0), none)
        first = torch.stack([solve(pilot.masses.double(), samples.atoms, rates) for pilot in pilots])
        first = torch.where(wanted > 0, CAUTION * first, first)
    with phase("texts nearer the rate, of every family"):
        contexts, measured = _contexts(drawn, "contexts", samples, CONTEXT_TEXTS, _seed(own, 1), first)
    correction = ((log_odds(wanted) - log_odds(measured)) / SLOPE).clamp(-2, 2)
    start = torch.where(wanted > 0, first + correction, first)
    fitter = HeadFitter(contexts, samples.atoms, rates, intercept=offset)
    last: list[torch.Tensor] = []

    def put(tilts: torch.Tensor) -> None:
        direction, constant = fitter.head(tilts.view_as(start))
        head.set(temperature * direction, temperature * constant)

    def measure(tilts: torch.Tensor, index: int) -> torch.Tensor:
        put(tilts)
        with phase(f"calibrating the set head, round {index + 1}"):
            last.append(drawn(f"round {index}", lambda: samples.rates(TEXTS[index], _seed(own, 2 + index))))
        return last[-1].mean(1).flatten()

    every = wanted.repeat(len(contexts))
    final, rounds = calibrate(measure, start.flatten(), every, least=len(TEXTS), most=len(TEXTS))
    put(final)
    price = fitter.price()
    return HeadReport(
        families=samples.names,
        rates=last[-1].mean(1).tolist(),
        intervals=[[mean_interval(texts[:, None]) for texts in family.T] for family in last[-1]],
        strengths=(price.teacher * temperature).tolist(),
        constant=(price.constant * temperature).tolist(),
        rates_of_constant=price.rates_of_constant.tolist(),
        kl=price.kl,
        kl_of_teacher=price.kl_of_teacher,
        kl_of_constant=price.kl_of_constant,
        offset=offset,
        ridge=fitter.ridge or 0.0,
        rounds=rounds,
        dial=[(0.0, float(silent[:, 0].mean())), (1.0, float(last[-1][..., 0].mean()))],
    )


def _contexts(
    drawn: Drawn, name: str, samples: FamilySamples, texts: int, seed: int, tilts: torch.Tensor
) -> tuple[list[Contexts], torch.Tensor]:
    """`FamilySamples.contexts`, kept as plain tensors."""

    def draw() -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor]:
        found, rates = samples.contexts(texts, seed, tilts)
        return [(one.states, one.masses, one.tilt) for one in found], rates

    parts, rates = drawn(name, draw)
    return [Contexts(*part) for part in parts], rates


def restore_head(head: SetHead, facts: dict[str, Any]) -> HeadReport:
    """The inverse of `head_facts`."""
    head.set(torch.tensor(facts["direction"]), torch.tensor(facts["constant"]))
    return HeadReport(**facts["report"])


def head_facts(head: SetHead, report: HeadReport) -> dict[str, Any]:
    """What a checkpoint holds of a fitted head, JSON-serialisable."""
    tensors = {"direction": head.direction.tolist(), "constant": head.offset.tolist()}
    return {**tensors, "report": asdict(report)}


def _seed(own: OwnSamples, number: int) -> int:
    return 7919 * (own.seed + 1) + 1000 + number
