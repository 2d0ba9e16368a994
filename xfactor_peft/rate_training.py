"""Training for a rate: solve the tilt, put it into the adapter, correct it on own samples, then perhaps plan.

1. lambda from the base's own probabilities on the contexts, then from samples of the tilted base.
2. Forward KL(q_lambda || model). With a set head whose offset starts at lambda the loss is 0 from the start and the
   phase ends at its first step; attention and MLP alone have to learn it, and fall short on small models.
3. `--sequence-level`: `planning`, then the set head's offset once more, so that R is the wanted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from .contexts import OPENING, batches, context_pool, openings
from .errors import XFactorError
from .head import SplitModel
from .keeper import Keeper
from .loading import Base
from .loop import Step, optimise
from .lora import LoraOptions, add_lora
from .memory import peaks, reset_peak
from .objectives import ObjectiveOptions, TiltedObjective
from .planning import Planner, PlanOptions, PlanStep
from .planning_state import PlanningState
from .rate_run import LENGTH, RateRun, room
from .rollouts import atom_masses, calibrate, solve
from .set_head import SetHead
from .targets import TiltedTarget
from .tilt import MAX_STRENGTH
from .token_bytes import special_ids
from .train_options import TrainOptions
from .training_state import history_tensor, keep_random, load_random

SOLVED, DISTIL, PLAN = "solved", "distil", "plan"
"""Phases of a run, for its checkpoints: lambda is known; the tilt is being learnt; the sequence-level phase."""

EXACT = 2e-4
"""Nats; a tilt this close to its teacher has nothing left to learn."""


def train_rate(
    base: Base,
    halves: SplitModel,
    target: TiltedTarget,
    options: TrainOptions,
    lora: LoraOptions,
    objective: ObjectiveOptions,
    on_step: Callable[[Step], None] | None = None,
    keeper: Keeper | None = None,
) -> RateRun:
    """Wrap `base` with an adapter whose samples hold the wanted rates; see the module.

    Args:
        keeper: saves the run when lambda is solved, as it learns the tilt, and after every batch of planning.

    Raises:
        XFactorError: the rates cannot be met together, or training fails.
        Interrupted: a signal stopped a run that has a keeper.
    """
    reset_peak(base.device)
    started = time.perf_counter()
    _check_room(base, objective)
    members = target.members(halves.weight.device)
    banned = sorted(special_ids(base.tokenizer))
    run = RateRun(base, halves, target, openings(base, 512, seed=options.seed), options.seed, members, banned)
    run.objective = objective
    if keeper and keeper.start:
        run.restore(keeper.start.facts["rate"])
        load_random(keeper.start.tensors())
    else:
        run.strengths = _solve(run, objective, options)
    _note(run, keeper, SOLVED)
    run.wrapped = add_lora(base.model, lora, sets=len(members))
    if lora.head:
        run.head = SetHead(base.model.get_output_embeddings(), members)
        run.head.shift(run.strengths)
    if keeper is None or keeper.start_phase != PLAN:
        _distil(run, options, objective, on_step, keeper)
    if objective.sequence_level:
        _plan(run, options, objective, on_step, keeper)
        if run.head is not None:
            run.correct_head()
    run.model.eval()
    run.seconds, run.peak = time.perf_counter() - started, peaks(base.device)
    return run


def _note(run: RateRun, keeper: Keeper | None, phase: str) -> None:
    """What of `run` the checkpoints of the phase that begins hold; lambda, once solved, has one of its own."""
    if keeper is None:
        return
    keeper.phase, keeper.facts["rate"] = phase, run.facts()
    if phase == SOLVED and keeper.start is None:
        tensors = {"history": history_tensor([])}
        keep_random(tensors)
        keeper.save(0, tensors, {})


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


def _distil(
    run: RateRun,
    options: TrainOptions,
    objective: ObjectiveOptions,
    on_step: Callable[[Step], None] | None,
    keeper: Keeper | None,
) -> None:
    """Forward KL from the tilted base, until nothing is left or it no longer falls.

    Without a set head the student lags behind its teacher, so at a third, a half and three quarters of the steps the
    teacher's lambda moves by what the student's own samples lack.
    """
    module = TiltedObjective(run.halves, run.target, run.adapter_off, run.head)
    module.strengths.copy_(run.strengths)
    inputs = batches(
        run.base, objective.contexts_for(run.target), options.batch_size, options.seq_len, seed=options.seed
    )

    lags = run.head is None and run.target.rates is not None
    checks = {options.steps // 3, options.steps // 2, 3 * options.steps // 4} if lags else set()

    def stop(history: list[Step]) -> bool:
        if len(history) in checks:
            module.strengths.copy_(_strengthen(run, module.strengths))
            _note(run, keeper, DISTIL)
        if history[-1].loss < EXACT:
            run.stopped = f"step {len(history)}: the adapter is the tilt (KL {history[-1].loss:.1e})"
        elif objective.early_stop and plateau([s.loss for s in history]):
            run.stopped = f"step {len(history)}: the loss no longer falls"
        return run.stopped is not None

    _note(run, keeper, DISTIL)
    run.history = optimise(run.base, run.model, module, inputs, options, on_step, stop, keeper)
    if run.head is not None:
        run.head.write()


@torch.no_grad()
def _strengthen(run: RateRun, strengths: torch.Tensor) -> torch.Tensor:
    """lambda plus the log-odds that the student's sampled rates lack; a goal of 0 stays as it is."""
    wanted, measured = torch.tensor(run.target.rates).double(), run.rates()
    run.calibration.append({"offset": strengths.tolist(), "rates": measured.tolist()})
    lacking = torch.logit(wanted, eps=1e-9) - torch.logit(measured, eps=1e-9)
    lacking = torch.where(wanted > 0, lacking.clamp(-1.5, 1.5), 0.0)
    run.strengths = (strengths.double().cpu() + lacking).clamp(-MAX_STRENGTH, MAX_STRENGTH)
    return run.strengths.to(strengths)


def plateau(losses: list[float], window: int = 100, least: float = 0.01) -> bool:
    """Whether the mean of the last `window` losses is not lower by `least` (a share) than that of the window before."""
    if len(losses) < 2 * window:
        return False
    recent, earlier = sum(losses[-window:]), sum(losses[-2 * window : -window])
    return recent > (1 - least) * earlier


def stop_planning(plan: list[PlanStep], rate: float) -> str | None:
    """Why planning should stop: KL at the wanted rate no longer falls, or texts drift apart; None to go on.

    KL is moved to the wanted rate along dKL/dR = lambda. Texts drift apart when the spread of R between them, over ten
    batches, is three times that of the first five: a mixture of full and empty texts is on its way.
    """
    if plateau([step.kl + step.strength * (rate - step.rate) for step in plan], window=40, least=0.005):
        return "the KL at the wanted rate no longer falls"
    spreads = [step.spread for step in plan]
    if len(spreads) >= 15 and sum(spreads[-10:]) / 10 > 3 * sum(spreads[:5]) / 5:
        return "the texts drift apart"
    return None


def _plan(
    run: RateRun,
    options: TrainOptions,
    objective: ObjectiveOptions,
    on_step: Callable[[Step], None] | None,
    keeper: Keeper | None,
) -> None:
    wanted = run.target.rates
    assert wanted is not None  # `ObjectiveOptions.check` saw to it
    rates = torch.tensor(wanted).to(run.members)
    length = min(LENGTH, room(run.base, run.starts.shape[1]))
    plan = PlanOptions(lr=options.learning_rate, seed=options.seed)
    planner = Planner(
        run.halves, run.head, run.members, run.adapter_off, rates,
        run.strengths.to(run.members), length, plan,
    )  # fmt: skip
    state, steps = PlanningState(planner, run), objective.sequence_steps
    run.model.eval()
    _note(run, keeper, PLAN)
    if keeper:
        keeper.restore(state)

    def stopped() -> bool:
        if objective.early_stop and (reason := stop_planning(run.plan, wanted[0])):
            run.stopped = f"batch {len(run.plan)} of planning: {reason}"
            return True
        return len(run.plan) == steps

    def sample(step: int) -> torch.Tensor:
        return run.sample(run.seed * 7 + 20_000 + step, plan.sequences)

    with keeper.deferred() if keeper else nullcontext():
        while not stopped():
            step = planner.update(sample, len(run.plan), steps)
            run.plan.append(step)
            run.history.append(Step(len(run.history), step.kl, step.rate, step.grad_norm, step.seconds))
            if on_step:
                on_step(run.history[-1])
            if keeper:
                keeper.after_step(state, last=len(run.plan) == steps, every=1)


def _check_room(base: Base, objective: ObjectiveOptions) -> None:
    if room(base, OPENING + 1) < 8:
        raise XFactorError("the model's context is too short to sample from for a rate")
