"""What the phases of a run for a rate share, and what is reported of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from ..checkpoint.checkpoints import Checkpoint
from ..checkpoint.state import random_states
from ..errors import XFactorError
from ..lora.set_head import SetHead
from ..objective.targets import TiltedTarget
from ..progress import phase
from ..sampling.calibration import Trace, calibrate
from ..sampling.contexts import OPENING, tokens_left
from ..sampling.frontier import Frontier, measure_frontier
from ..sampling.metrics import Evaluation
from ..sampling.own_samples import TEXTS, OwnSamples
from ..sampling.reweighting import Estimate, TiltedSamples
from .rate_head import HeadReport, head_facts
from .run import TrainingRun
from .sequence.trainer import SequenceStep

CALIBRATION, SOLVED, DISTIL, SEQUENCE = "calibration", "solved", "distil", "sequence"
"""Phases of a run, for its checkpoints: samples are drawn; lambda is known; the tilt is being learnt; whole texts are
planned."""
DIAL_SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)
SAMPLED_SCALES = (1.0, 0.0, 1.25, 0.5)
"""Of a tilt, where texts that there are say too little, in this order."""
HEAD_SCALES = (0.5, 1.25)
"""Of a head that looks, of which 0 and 1 are known and between which log-odds are nearly a line."""
DIAL_TEXTS = 24
"""Effective texts that a point of the dial needs."""


@dataclass
class SequenceReport:
    """How the sequence-level phase went.

    Attributes:
        kl, kl_of_tilt: KL per token at the wanted rate, of the planning policy and of the tilt it began with.
        kept: whether the planning policy was cheaper, and was kept.
    """

    steps: list[SequenceStep]
    kl: float | None = None
    kl_of_tilt: float | None = None
    kept: bool = False


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


class RateRun:
    """A run for a rate: its samples and its set head, and lambda as far as it is known.

    Attributes:
        wanted: R (K,), float64; empty where strengths are given.
        strengths: lambda (K,) of the teacher, float64.
        calibration: rounds of (strength or offset, sampled rates).
        stopped: why training ended before its last step.
        looks: whether the set head is fitted to the families of prompts.
        fitted: how it was, once it is.
        sequence: what the sequence-level phase did.
        tilted: texts of the tilted base.
    """

    def __init__(self, run: TrainingRun, target: TiltedTarget) -> None:
        if tokens_left(run.base, OPENING + 1) < 8:
            raise XFactorError("the model's context is too short to sample from for a rate")
        self.run, self.target = run, target
        self.wanted = torch.tensor(target.rates or [], dtype=torch.float64)
        members = target.members(run.split_model.weight.device)
        options = run.recipe.objective
        self.samples = OwnSamples(run.base, run.split_model, members, run.recipe.train.seed, options.rate)
        self.looks = target.looks(run.lora, options)
        self.head: SetHead | None = None
        self.fitted: HeadReport | None = None
        self.strengths = torch.zeros(0)
        self.calibration: Trace = []
        self.stopped: str | None = None
        self.sequence: SequenceReport | None = None
        self.tilted = TiltedSamples(self.samples.atoms.patterns)
        start = run.hooks.checkpointer.start
        self._kept = start.state()["drawn"] if start and run.hooks.checkpointer.start_phase == CALIBRATION else {}

    @property
    def start(self) -> Checkpoint | None:
        """The checkpoint that the run resumes from, if lambda was known there."""
        checkpointer = self.run.hooks.checkpointer
        return None if checkpointer.start_phase == CALIBRATION else checkpointer.start

    def drawn(self, name: str, draw: Callable[[], Any]) -> Any:
        """What `draw` gives: tensors, in lists or tuples.

        While lambda is sought they are kept under `name`, for a run that resumes this one.
        """
        checkpointer = self.run.hooks.checkpointer
        if checkpointer.phase != CALIBRATION:
            return draw()
        if name not in self._kept:
            self._kept[name] = draw()
            checkpointer.save(0, {"history": [], "drawn": self._kept}, {})
        return self._kept[name]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds of the run besides its tensors, JSON-serialisable."""
        head = head_facts(self.head, self.fitted) if self.head is not None and self.fitted else None
        found = {"strengths": self.strengths.tolist(), "calibration": list(self.calibration), "stopped": self.stopped}
        return {**found, "head": head}

    def restore(self, facts: dict[str, Any]) -> None:
        """The inverse of `facts`, but for the head, which is made later."""
        self.strengths = torch.tensor(facts["strengths"], dtype=torch.float64)
        self.calibration, self.stopped = list(facts["calibration"]), facts["stopped"]

    def enter(self, phase: str) -> None:
        """Tell the checkpoints what they hold of this run from here on; lambda, once solved, has one of its own."""
        self.run.enter(phase, rate=self.facts())
        checkpointer = self.run.hooks.checkpointer
        if phase == SOLVED and self.start is None:
            self._kept = {}
            checkpointer.save(0, {"history": [], "random": random_states()}, {})

    def correct_head(self) -> None:
        """Move the set head's offset until the sampled rates are the wanted ones."""
        head = self.head
        assert head is not None

        def measure(offset: torch.Tensor, index: int) -> torch.Tensor:
            head.shift(offset.to(head.offset) - head.offset.detach())
            with phase(f"calibrating the set head, round {index + 1}"):
                return self.samples.rates(index=index)

        offset, rounds = calibrate(measure, head.offset.detach().double().cpu(), self.wanted)
        head.shift(offset.to(head.offset) - head.offset.detach())
        self.calibration += rounds

    def report(self) -> RateReport:
        """What is known of the run before anything is measured of it."""
        return RateReport(
            wanted=self.target.rates,
            strengths=self.strengths.tolist(),
            offsets=self.head.offset.detach().tolist() if self.head is not None else None,
            calibration=self.calibration,
            sequence=self.sequence,
            frontier=None,
            dial=[],
            stopped=self.stopped,
            head=self.fitted,
        )

    def measured(self, scores: Evaluation | None) -> RateReport:
        """The same with the frontier and the dial, where they are asked for."""
        run, options, evaluation = self.run, self.run.recipe.objective, self.run.recipe.evaluation
        frontier = None
        asked = options.frontier and len(self.target.goals) == 1 and not self.looks  # whose price the fit knows
        if asked and scores is not None and evaluation is not None:
            if self._is_logit_bias():
                frontier = Frontier(float(self.strengths[0]), scores.kl_from_base, 1.0, scores)
            else:
                with phase("measuring the logit bias at the same rate"):
                    frontier = measure_frontier(
                        run.split_model, run.base.tokenizer, self.target.tokens, scores, evaluation,
                        start=float(self.strengths[0]), adapter_off=run.adapter_off,
                    )  # fmt: skip
        return replace(self.report(), frontier=frontier, dial=self._dial() if options.dial else [])

    def tilted_texts(self, strengths: torch.Tensor, texts: int, index: int) -> tuple[torch.Tensor, Estimate]:
        """Texts of the base tilted by lambda / T (K,), kept in `tilted`: the atoms' masses along them, and their rates.

        A bias lambda raises the decoded logits, which are divided by the temperature T, by lambda / T.
        """
        tilt = strengths * self.samples.rate.temperature
        masses, atoms = self.drawn(f"texts {index}", lambda: self.samples.texts(tilt, texts, index))
        return masses, self.tilted.add(strengths, masses, atoms)

    def _is_logit_bias(self) -> bool:
        """Whether the adapter is a constant logit bias on one set and nothing else."""
        return self._is_tilt() and len(self.target.goals) == 1

    def _is_tilt(self) -> bool:
        """Whether the adapter raises whole sets by constants and does nothing else."""
        return self.head is not None and not self.run.lora.blocks and not self.head.direction.any()

    def _dial(self) -> list[tuple[float, float]]:
        """Expected R of the first goal at several scales of the adapter.

        For a tilt, texts that there are say it, weighed; where they say too little, one of `SAMPLED_SCALES` is sampled,
        and another left out, as log-odds between two points of the dial are nearly a line.
        """
        if self.fitted is not None:
            return sorted([*self.fitted.dial, *((s, self._sampled(s, n)) for n, s in enumerate(HEAD_SCALES))])
        if not self._is_tilt():
            return [(scale, self._sampled(scale, number)) for number, scale in enumerate(DIAL_SCALES)]
        for number, scale in enumerate(SAMPLED_SCALES):
            strengths = self._tempered(scale)
            if self.tilted.estimate(strengths).texts < DIAL_TEXTS:
                with self.run.base_only(), phase(f"measuring R at scale {scale:g}"):
                    self.tilted_texts(strengths, 2 * DIAL_TEXTS, 100 + number)
        found = [(scale, self.tilted.estimate(self._tempered(scale))) for scale in DIAL_SCALES]
        return [(scale, float(point.rates[0])) for scale, point in found if point.texts >= DIAL_TEXTS]

    def _tempered(self, scale: float) -> torch.Tensor:
        """lambda at a scale, as a bias of logits that decoding divides by its temperature."""
        return scale * self.strengths / self.samples.rate.temperature

    def _sampled(self, scale: float, number: int) -> float:
        _set_scale(self.run.model, scale)
        with phase(f"measuring R at scale {scale:g}"):
            masses, _ = self.samples.texts(None, TEXTS // 3, number)
        _set_scale(self.run.model, 1.0)
        return float((masses.double().mean((0, 1)) @ self.samples.atoms.patterns)[0])


def _set_scale(model: torch.nn.Module, scale: float, adapter: str = "default") -> None:
    """Scale one adapter in every layer; 1 is as trained, 0 the base."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            module.set_scale(adapter, scale)
