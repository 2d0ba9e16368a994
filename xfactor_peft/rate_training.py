"""Training for a rate: solve the tilt, put it into the adapter, correct it on own samples, then perhaps plan.

1. lambda from the base's own probabilities on the contexts, then from samples of the tilted base.
2. Forward KL(q_lambda || model). With a set head whose offset starts at lambda the loss is 0 from the start and the
   phase ends at its first step; attention and MLP alone have to learn it, and fall short on small models.
3. `--sequence-level`: `planning`, then the set head's offset once more, so that R is the wanted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel

from .contexts import OPENING, batches, context_pool, openings
from .errors import XFactorError
from .frontier import Frontier, measure_frontier
from .generation import sample_after
from .head import SplitModel
from .loading import Base
from .lora import LoraOptions, adapter_off, add_lora
from .memory import peaks, reset_peak
from .metrics import EvalOptions, Evaluation
from .objectives import ObjectiveOptions, TiltedObjective
from .planning import Planner, PlanOptions, PlanStep
from .rollouts import atom_masses, calibrate, solve
from .set_head import SetHead
from .targets import TiltedTarget
from .tilt import Atoms
from .token_bytes import special_ids
from .training import Step, TrainOptions, optimise

CALIBRATION_TEXTS, LENGTH = 192, 64
EXACT = 2e-4
"""Nats; a tilt this close to its teacher has nothing left to learn."""
DIAL_SCALES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)


@dataclass(frozen=True)
class RateReport:
    """How a rate was reached, JSON-serialisable.

    Attributes:
        strengths: lambda of every goal in the teacher.
        offsets: b of every goal in the set head; None without one.
        calibration: rounds of (strength, sampled rate).
        plan: steps of the sequence-level phase.
        frontier: the exact logit bias at the same set mass (of the first goal).
        dial: pairs (scale, expected R).
    """

    wanted: list[float] | None
    strengths: list[float]
    offsets: list[float] | None
    calibration: list[dict[str, list[float]]]
    plan: list[PlanStep]
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
    """A run under way: the wrapped model, its set head, and the means to sample it."""

    base: Base
    halves: SplitModel
    target: TiltedTarget
    starts: torch.Tensor
    seed: int
    members: torch.Tensor
    banned: list[int]
    model: PeftModel | None = None
    head: SetHead | None = None
    strengths: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    calibration: list[dict[str, list[float]]] = field(default_factory=list)
    history: list[Step] = field(default_factory=list)
    plan: list[PlanStep] = field(default_factory=list)
    stopped: str | None = None
    seconds: float = 0.0
    peak: dict[str, float] = field(default_factory=dict)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)

    @property
    def atoms(self) -> Atoms:
        return Atoms.of(self.members.cpu())

    def adapter_off(self) -> AbstractContextManager:
        return adapter_off(self.model)

    def sample(self, seed: int, count: int, tilt: torch.Tensor | None = None) -> torch.Tensor:
        """`count` openings of the base, continued by `LENGTH` tokens of the model as it is."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.starts[torch.randperm(len(self.starts), generator=generator)[:count]]
        new = min(LENGTH, _room(self.base, rows.shape[1]))
        return sample_after(self.halves.model, rows, new, seed=seed, banned=self.banned, tilt=tilt)

    def rates(self, tilt: torch.Tensor | None = None, count: int = CALIBRATION_TEXTS, index: int = 0) -> torch.Tensor:
        """Sampled rates (K,) float64; the same texts come again for the same index."""
        policy = SplitModel(self.halves.model, tilt)
        ids = self.sample(7919 * (self.seed + 1) + index, count, tilt)
        banned = torch.tensor(self.banned, device=self.halves.weight.device)
        masses = atom_masses(policy, ids, self.starts.shape[1], self.atoms, banned)
        return (masses @ self.atoms.patterns).mean(0)

    def correct_head(self) -> None:
        """Move the set head's offset until the sampled rates are the wanted ones."""
        head, wanted = self.head, torch.tensor(self.target.rates, dtype=torch.float64)

        def measure(offset: torch.Tensor, index: int) -> torch.Tensor:
            head.shift(offset.to(head.offset) - head.offset.detach())
            return self.rates(index=index)

        offset, trace = calibrate(measure, head.offset.detach().double().cpu(), wanted)
        head.shift(offset.to(head.offset) - head.offset.detach())
        self.calibration += trace

    def report(
        self, halves: SplitModel, target: TiltedTarget, evaluation: EvalOptions, scores: Evaluation
    ) -> RateReport:
        frontier = None
        if self.objective.frontier:
            frontier = measure_frontier(
                halves, self.base.tokenizer, target.tokens, scores, evaluation,
                start=float(self.strengths[0]), adapter_off=self.adapter_off,
            )  # fmt: skip
        return RateReport(
            wanted=target.rates,
            strengths=self.strengths.tolist(),
            offsets=self.head.offset.detach().tolist() if self.head is not None else None,
            calibration=self.calibration,
            plan=self.plan,
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
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter in module.scaling:
            module.set_scale(adapter, scale)


def train_rate(
    base: Base,
    halves: SplitModel,
    target: TiltedTarget,
    options: TrainOptions,
    lora: LoraOptions,
    objective: ObjectiveOptions,
    on_step: Callable[[Step], None] | None = None,
) -> RateRun:
    """Wrap `base` with an adapter whose samples hold the wanted rates; see the module.

    Raises:
        XFactorError: the rates cannot be met together, or training fails.
    """
    reset_peak(base.device)
    started = time.perf_counter()
    _check_room(base, objective)
    members = target.members(halves.weight.device)
    banned = sorted(special_ids(base.tokenizer))
    run = RateRun(base, halves, target, openings(base, 512, seed=options.seed), options.seed, members, banned)
    run.objective = objective
    run.strengths = _solve(run, objective, options)
    run.model = add_lora(base.model, lora, sets=len(members))
    if lora.head:
        run.head = SetHead(base.model.get_output_embeddings(), members)
        run.head.shift(run.strengths)
    _distil(run, options, objective, on_step)
    if objective.sequence_level:
        _plan(run, options, lora, objective, on_step)
        if run.head is not None:
            run.correct_head()
    run.model.eval()
    run.seconds, run.peak = time.perf_counter() - started, peaks(base.device)
    return run


def _solve(run: RateRun, objective: ObjectiveOptions, options: TrainOptions) -> torch.Tensor:
    """lambda (K,): given, or solved on contexts and corrected on samples of the tilted base."""
    target = run.target
    if target.rates is None:
        return torch.tensor([goal.strength for goal in target.goals], dtype=torch.float64)
    pool = context_pool(run.base, objective.contexts_for(target), options.seq_len, seed=options.seed, count=128)
    masses = atom_masses(run.halves, pool, 1, run.atoms) if pool.shape[1] > 1 else None
    if masses is None:
        raise XFactorError("--seq-len must be at least 2 for a rate")
    first = solve(masses, run.atoms, target.rates)
    wanted = torch.tensor(target.rates, dtype=torch.float64)

    def measure(strengths: torch.Tensor, index: int) -> torch.Tensor:
        return run.rates(strengths.to(run.members) @ run.members, index=index)

    strengths, trace = calibrate(measure, first, wanted)
    run.calibration += trace
    return strengths


def _distil(run: RateRun, options: TrainOptions, objective: ObjectiveOptions, on_step) -> None:
    """Forward KL from the tilted base, until nothing is left or it no longer falls."""
    module = TiltedObjective(run.halves, run.target, run.adapter_off, run.head)
    module.strengths.copy_(run.strengths)
    inputs = batches(
        run.base, objective.contexts_for(run.target), options.batch_size, options.seq_len, seed=options.seed
    )

    def stop(history: list[Step]) -> bool:
        if history[-1].loss < EXACT:
            run.stopped = f"step {len(history)}: the adapter is the tilt (KL {history[-1].loss:.1e})"
        elif objective.early_stop and plateau([s.loss for s in history]):
            run.stopped = f"step {len(history)}: the loss no longer falls"
        return run.stopped is not None

    run.history = optimise(run.base, run.model, module, inputs, options, on_step, stop)
    if run.head is not None:
        run.head.write()


def plateau(losses: list[float], window: int = 100, least: float = 0.01) -> bool:
    """Whether the mean of the last `window` losses is not lower by `least` (a share) than that of the window before."""
    if len(losses) < 2 * window:
        return False
    recent, earlier = sum(losses[-window:]), sum(losses[-2 * window : -window])
    return recent > (1 - least) * earlier


def _plan(run: RateRun, options: TrainOptions, lora: LoraOptions, objective: ObjectiveOptions, on_step) -> None:
    rates = torch.tensor(run.target.rates).to(run.members)
    length = min(LENGTH, _room(run.base, run.starts.shape[1]))
    plan = PlanOptions(lr=options.learning_rate, seed=options.seed)
    planner = Planner(
        run.halves, run.head, run.members, run.adapter_off, rates,
        run.strengths.to(run.members), length, plan,
    )  # fmt: skip
    first = len(run.history)
    for step in planner.run(lambda i: run.sample(run.seed * 7 + 20_000 + i, plan.sequences), objective.sequence_steps):
        run.plan.append(step)
        run.history.append(Step(first + step.step, step.kl, step.rate, step.grad_norm, step.seconds))
        if on_step:
            on_step(run.history[-1])


def _room(base: Base, used: int) -> int:
    context = getattr(base.model.config, "max_position_embeddings", None) or 1 << 20
    return context - used


def _check_room(base: Base, objective: ObjectiveOptions) -> None:
    if _room(base, OPENING + 1) < 8:
        raise XFactorError("the model's context is too short to sample from for a rate")
