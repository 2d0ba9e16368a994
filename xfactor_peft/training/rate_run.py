"""A training run for a rate: its state, the rates of its samples, and what is reported of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..base.loading import Base
from ..base.split_model import SplitModel
from ..checkpoint.state import history_tensor, keep_random
from ..lora.set_head import SetHead
from ..lora.wrap import adapter_off
from ..objective.targets import TiltedTarget
from ..objective.tilt import Atoms
from ..options import EvalOptions, ObjectiveOptions
from ..sampling.calibration import atom_masses, calibrate
from ..sampling.frontier import Frontier, measure_frontier
from ..sampling.generation import sample_after
from ..sampling.metrics import Evaluation
from .sequence.planner import PlanStep

if TYPE_CHECKING:
    from ..checkpoint.checkpointer import Checkpointer
    from .loop import Step

CALIBRATION_TEXTS, LENGTH = 256, 64
SOLVED, DISTIL, PLAN = "solved", "distil", "plan"
"""Phases of a run, for its checkpoints: lambda is known; the tilt is being learnt; the sequence-level phase."""
DIAL_SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)


@dataclass(frozen=True)
class RateReport:
    """How a rate was reached, JSON-serialisable.

    Attributes:
        strengths: lambda of every goal in the teacher.
        offsets: b of every goal in the set head; None without one.
        calibration: rounds of (strength, sampled rate).
        plan: steps of the sequence-level phase.
        planning: its KL per token and the tilt's, and whether it was kept; None without that phase.
        frontier: the exact logit bias at the same set mass; None for several goals, whose tilt is one itself.
        dial: pairs (scale, expected R).
    """

    wanted: list[float] | None
    strengths: list[float]
    offsets: list[float] | None
    calibration: list[dict[str, list[float]]]
    plan: list[PlanStep]
    planning: dict[str, Any] | None
    frontier: Frontier | None
    dial: list[tuple[float, float]]
    stopped: str | None

    def record(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["plan"] = [asdict(step) for step in self.plan]
        values["frontier"] = self.frontier.record() if self.frontier else None
        return values


@dataclass
class RateRun:
    """A run under way: PEFT's wrapper round the model (once there is one), its set head, and the means to sample it."""

    base: Base
    split_model: SplitModel
    target: TiltedTarget
    starts: torch.Tensor
    seed: int
    members: torch.Tensor
    banned: list[int]
    wrapped: PeftModel | None = None
    head: SetHead | None = None
    strengths: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    calibration: list[dict[str, list[float]]] = field(default_factory=list)
    history: list[Step] = field(default_factory=list)
    plan: list[PlanStep] = field(default_factory=list)
    planning: dict[str, Any] | None = None
    stopped: str | None = None
    seconds: float = 0.0
    peak: dict[str, float] = field(default_factory=dict)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)

    @property
    def model(self) -> PeftModel:
        """What is trained; there is none before lambda is known."""
        assert self.wrapped is not None
        return self.wrapped

    @property
    def atoms(self) -> Atoms:
        return Atoms.of(self.members.cpu())

    def adapter_off(self) -> AbstractContextManager:
        return adapter_off(self.model)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds of the run beside its tensors, JSON-serialisable."""
        return {"strengths": self.strengths.tolist(), "calibration": list(self.calibration), "stopped": self.stopped}

    def restore(self, facts: dict[str, Any]) -> None:
        """The inverse of `facts`."""
        self.strengths = torch.tensor(facts["strengths"], dtype=torch.float64)
        self.calibration, self.stopped = list(facts["calibration"]), facts["stopped"]

    def note(self, checkpointer: Checkpointer | None, phase: str) -> None:
        """Tell the checkpoints what they hold of this run from here on; lambda, once solved, has one of its own."""
        if checkpointer is None:
            return
        checkpointer.phase, checkpointer.facts["rate"] = phase, self.facts()
        if phase == SOLVED and checkpointer.start is None:
            tensors = {"history": history_tensor([])}
            keep_random(tensors)
            checkpointer.save(0, tensors, {})

    def sample(self, seed: int, count: int, tilt: torch.Tensor | None = None) -> torch.Tensor:
        """`count` openings of the base, continued by `LENGTH` tokens of the model as it is."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.starts[torch.randperm(len(self.starts), generator=generator)[:count]]
        new = min(LENGTH, tokens_left(self.base, rows.shape[1]))
        return sample_after(self.split_model.model, rows, new, seed=seed, banned=self.banned, tilt=tilt)

    def rates(self, tilt: torch.Tensor | None = None, count: int = CALIBRATION_TEXTS, index: int = 0) -> torch.Tensor:
        """Sampled rates (K,) float64; the same texts come again for the same index."""
        policy = SplitModel(self.split_model.model, tilt)
        ids = self.sample(7919 * (self.seed + 1) + index, count, tilt)
        banned = torch.tensor(self.banned, device=self.split_model.weight.device)
        masses = atom_masses(policy, ids, self.starts.shape[1], self.atoms, banned)
        return (masses @ self.atoms.patterns).mean(0)

    def correct_head(self) -> None:
        """Move the set head's offset until the sampled rates are the wanted ones."""
        head, wanted = self.head, torch.tensor(self.target.rates, dtype=torch.float64)
        assert head is not None

        def measure(offset: torch.Tensor, index: int) -> torch.Tensor:
            head.shift(offset.to(head.offset) - head.offset.detach())
            return self.rates(index=index)

        offset, trace = calibrate(measure, head.offset.detach().double().cpu(), wanted)
        head.shift(offset.to(head.offset) - head.offset.detach())
        self.calibration += trace

    def report(self, evaluation: EvalOptions, scores: Evaluation) -> RateReport:
        target, frontier = self.target, None
        if self.objective.frontier and len(target.goals) == 1:
            frontier = measure_frontier(
                self.split_model, self.base.tokenizer, target.tokens, scores, evaluation,
                start=float(self.strengths[0]), adapter_off=self.adapter_off,
            )  # fmt: skip
        return RateReport(
            wanted=target.rates,
            strengths=self.strengths.tolist(),
            offsets=self.head.offset.detach().tolist() if self.head is not None else None,
            calibration=self.calibration,
            plan=self.plan,
            planning=self.planning,
            frontier=frontier,
            dial=self.dial() if self.objective.dial else [],
            stopped=self.stopped,
        )

    def dial(self) -> list[tuple[float, float]]:
        """Expected R of the first goal at several scales of the adapter."""
        pairs = []
        for scale in DIAL_SCALES:
            set_scale(self.model, scale)
            pairs.append((scale, float(self.rates(count=CALIBRATION_TEXTS // 3)[0])))
        set_scale(self.model, 1.0)
        return pairs


def set_scale(model: PeftModel, scale: float, adapter: str = "default") -> None:
    """Scale one adapter in every layer; 1 is as trained, 0 the base."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            module.set_scale(adapter, scale)


def tokens_left(base: Base, used: int) -> int:
    """Tokens that the model's context still holds after `used`; a large number when it has no limit."""
    context = getattr(base.model.config, "max_position_embeddings", None) or 1 << 20
    return context - used
