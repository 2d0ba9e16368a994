"""What is reported of a run for a rate: how it was reached, its price beside the frontier's, and the dial."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from peft.helpers import rescale_adapter_scale

from ..progress import phase
from ..sampling.calibration import Trace
from ..sampling.frontier import Frontier, measure_frontier
from ..sampling.metrics import Evaluation
from ..sampling.own_samples import TEXTS
from .rate import RateRun, SequenceReport
from .rate_head import HeadReport

DIAL_SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)
SAMPLED_SCALES = (1.0, 0.0, 1.25, 0.5)
"""Of a tilt, where texts that there are say too little, in this order."""
HEAD_SCALES = (0.5, 1.25)
"""Of a head that looks, of which 0 and 1 are known and between which log-odds are nearly a line."""
DIAL_TEXTS = 24
"""Effective texts that a point of the dial needs."""


@dataclass(frozen=True)
class RateReport:
    """How a rate was reached, JSON-serialisable.

    Attributes:
        strengths: lambda of every goal in the teacher.
        offsets: b of every goal in the set head; None without one.
        calibration: rounds of (strength, sampled rate).
        sequence: the sequence-level phase; None without it.
        frontier: the exact logit bias at the same set mass; None for several goals, whose tilt is one itself.
        dial: pairs (scale, expected R).
        head: the fit of a head that looks; None where the tilt is a constant.
    """

    wanted: list[float] | None
    strengths: list[float]
    offsets: list[float] | None
    calibration: Trace
    sequence: SequenceReport | None
    frontier: Frontier | None
    dial: list[tuple[float, float]]
    stopped: str | None
    head: HeadReport | None = None

    def record(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["sequence"] = asdict(self.sequence) if self.sequence else None
        values["head"] = self.head.record() if self.head else None
        values["frontier"] = self.frontier.record() if self.frontier else None
        return values


def report_of(rate: RateRun) -> RateReport:
    """What is known of the run before anything is measured of it."""
    return RateReport(
        wanted=rate.target.rates,
        strengths=rate.strengths.tolist(),
        offsets=rate.head.offset.detach().tolist() if rate.head is not None else None,
        calibration=rate.calibration,
        sequence=rate.sequence,
        frontier=None,
        dial=[],
        stopped=rate.stopped,
        head=rate.fitted,
    )


def measured(rate: RateRun, scores: Evaluation | None) -> RateReport:
    """The same with the frontier and the dial, where they are asked for; `scores` are those of the trained model."""
    frontier = _frontier(rate, scores)
    dial = _dial(rate) if rate.run.recipe.objective.dial else []
    return replace(report_of(rate), frontier=frontier, dial=dial)


def _frontier(rate: RateRun, scores: Evaluation | None) -> Frontier | None:
    run, evaluation = rate.run, rate.run.recipe.evaluation
    if scores is None or evaluation is None or not run.recipe.objective.frontier:
        return None
    if len(rate.target.goals) > 1 or rate.looks:  # a head that looks knows its price from its fit
        return None
    if rate.is_tilt():
        return Frontier(float(rate.strengths[0]), scores.kl_from_base, 1.0, scores)
    with phase("measuring the logit bias at the same rate"):
        return measure_frontier(
            run.split_model, run.base.tokenizer, rate.target.tokens, scores, evaluation,
            start=float(rate.strengths[0]), adapter_off=run.adapter_off,
        )  # fmt: skip


def _dial(rate: RateRun) -> list[tuple[float, float]]:
    """Expected R of the first goal at several scales of the adapter.

    For a tilt, texts that there are say it, weighed; where they say too little, one of `SAMPLED_SCALES` is sampled,
    and another left out, as log-odds between two points of the dial are nearly a line. Where top-k or top-p cut, they
    are none, and the texts' masses say nothing of what was cut: every scale is sampled.
    """
    cuts = rate.samples.rate.cuts
    if rate.fitted is not None and not cuts:
        return sorted([*rate.fitted.dial, *((s, _sampled(rate, s, n)) for n, s in enumerate(HEAD_SCALES))])
    if cuts or not rate.is_tilt():
        return [(scale, _sampled(rate, scale, number)) for number, scale in enumerate(DIAL_SCALES)]
    unit = rate.strengths / rate.samples.rate.temperature  # as a bias of logits that decoding divides by it
    for number, scale in enumerate(SAMPLED_SCALES):
        if rate.tilted.estimate(scale * unit).texts < DIAL_TEXTS:
            with rate.run.base_only(), phase(f"measuring R at scale {scale:g}"):
                rate.tilted_texts(scale * unit, 2 * DIAL_TEXTS, 100 + number)
    found = [(scale, rate.tilted.estimate(scale * unit)) for scale in DIAL_SCALES]
    return [(scale, float(point.rates[0])) for scale, point in found if point.texts >= DIAL_TEXTS]


def _sampled(rate: RateRun, scale: float, number: int) -> float:
    with rescale_adapter_scale(rate.run.model, scale), phase(f"measuring R at scale {scale:g}"):
        masses, _ = rate.samples.texts(None, TEXTS // 3, number)
    return float((masses.double().mean((0, 1)) @ rate.samples.atoms.patterns)[0])
