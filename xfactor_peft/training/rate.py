"""What the phases of a run for a rate share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.checkpoints import Checkpoint
from ..checkpoint.state import random_states
from ..errors import XFactorError
from ..lora.set_head import SetHead
from ..objective.targets import TiltedTarget
from ..progress import phase
from ..sampling.calibration import Trace, calibrate
from ..sampling.contexts import OPENING, tokens_left
from ..sampling.own_samples import OwnSamples
from ..sampling.reweighting import Estimate, TiltedSamples
from .rate_head import HeadReport, head_facts
from .run import TrainingRun
from .sequence.trainer import SequenceStep

CALIBRATION, SOLVED, DISTIL, SEQUENCE = "calibration", "solved", "distil", "sequence"
"""Phases of a run, for its checkpoints: samples are drawn; lambda is known; the tilt is being learnt; whole texts are
planned."""


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

    def restore(self, facts: dict[str, Any], state: dict[str, Any]) -> None:
        """Become what a checkpoint's facts and state say, but for the head, which is made later."""
        self.strengths = torch.tensor(facts["strengths"], dtype=torch.float64)
        self.calibration, self.stopped = list(facts["calibration"]), facts["stopped"]
        if "tilted" in state:
            self.tilted.restore(state["tilted"])

    def enter(self, phase: str) -> None:
        """Tell the checkpoints what they hold of this run from here on; lambda, once solved, has one of its own.

        A tilt has nothing more to learn, so that one also holds the texts that its dial rests on.
        """
        self.run.enter(phase, rate=self.facts())
        checkpointer = self.run.hooks.checkpointer
        if phase == SOLVED and self.start is None:
            self._kept = {}
            state = {"history": [], "random": random_states(), "tilted": self.tilted.capture()}
            checkpointer.save(0, state, {})

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

    def tilted_texts(self, strengths: torch.Tensor, texts: int, index: int) -> tuple[torch.Tensor, Estimate]:
        """Texts of the base tilted by lambda / T (K,), kept in `tilted`: the atoms' masses along them, and their rates.

        A bias lambda raises the decoded logits, which are divided by the temperature T, by lambda / T.
        """
        tilt = strengths * self.samples.rate.temperature
        masses, atoms = self.drawn(f"texts {index}", lambda: self.samples.texts(tilt, texts, index))
        return masses, self.tilted.add(strengths, masses, atoms)

    def uncut_masses(self, texts: int) -> torch.Tensor:
        """Masses of the atoms along about `texts` texts of the model before top-k and top-p cut any, (M, P) float64."""
        families, seed = self.samples.families, 7919 * (self.samples.seed + 1) - 1

        def draw() -> torch.Tensor:
            parts, _ = families.contexts(-(-texts // len(families.prompts)), seed)
            return torch.cat([part.masses.flatten(0, 1) for part in parts])

        return self.drawn("uncut masses", draw).double()

    def is_tilt(self) -> bool:
        """Whether the adapter raises whole sets by constants and does nothing else."""
        return self.head is not None and not self.run.lora.blocks and not self.head.direction.any()
