"""The sequence-level phase of a run for a rate: batches until nothing is gained, and the tilt again if nothing was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from ...checkpoint.checkpointer import Checkpointer
from ...options import ObjectiveOptions, TrainOptions
from ..loop import Step
from ..rate_run import LENGTH, PLAN, RateRun, tokens_left
from ..stopping import stop_planning
from .planner import Planner, PlanOptions
from .state import PlanningState

CHECK_TEXTS = 128


def plan_texts(
    run: RateRun,
    options: TrainOptions,
    objective: ObjectiveOptions,
    on_step: Callable[[Step], None] | None,
    checkpointer: Checkpointer | None,
) -> None:
    """Improve the tilted policy of `run` in place; where nothing is gained in the end, the tilt comes back.

    Below a few set tokens a text the score function is all noise, and what it leaves behind costs KL. So the policy,
    its offset corrected, is compared with the one that the phase began with, on `CHECK_TEXTS` samples of each.
    """
    wanted = run.target.rates
    assert wanted is not None  # `ObjectiveOptions.check` saw to it
    rates = torch.tensor(wanted).to(run.members)
    length = min(LENGTH, tokens_left(run.base, run.starts.shape[1]))
    plan = PlanOptions(lr=options.learning_rate, seed=options.seed)
    planner = Planner(
        run.split_model, run.head, run.members, run.adapter_off, rates,
        run.strengths.to(run.members), length, plan,
    )  # fmt: skip
    state, steps = PlanningState(planner, run), objective.sequence_steps
    run.model.eval()
    run.note(checkpointer, PLAN)
    if checkpointer:
        checkpointer.restore(state)

    def stopped() -> bool:
        if objective.early_stop and (reason := stop_planning(run.plan, wanted[0])):
            run.stopped = f"batch {len(run.plan)} of planning: {reason}"
            return True
        return len(run.plan) == steps

    def sample(step: int) -> torch.Tensor:
        return run.sample(run.seed * 7 + 20_000 + step, plan.sequences)

    with checkpointer.deferred() if checkpointer else nullcontext():
        while not stopped():
            step = planner.update(sample, len(run.plan), steps)
            run.plan.append(step)
            run.history.append(Step(len(run.history), step.kl, step.rate, step.grad_norm, step.seconds))
            if on_step:
                on_step(run.history[-1])
            if checkpointer:
                checkpointer.after_step(state, last=len(run.plan) == steps, every=1)
    _keep_the_better(run, planner, state)


def _keep_the_better(run: RateRun, planner: Planner, state: PlanningState) -> None:
    """Calibrate the planned policy's set head, then the planned weights or those of the tilt, whichever cost less."""
    if run.head is not None:
        run.correct_head()

    def price() -> float:
        texts = run.sample(run.seed * 7 + 30_000, CHECK_TEXTS)
        return planner.price(texts, run.strengths.to(planner.rates))

    planned, cost = state.weights(), price()
    state.load_weights(state.before)
    tilt = price()
    run.planning = {"kl": cost, "kl_of_tilt": tilt, "kept": cost < tilt}
    if cost < tilt:
        state.load_weights(planned)
    else:
        run.stopped = f"planning gained nothing (KL {cost:.4f}, the tilt's {tilt:.4f}), so the tilt is kept"
