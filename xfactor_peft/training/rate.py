"""Training for a rate: solve the tilt, put it into the adapter, correct it on own samples, then perhaps plan.

1. lambda from the base's own probabilities on the contexts, then from samples of the tilted base.
2. Forward KL(q_lambda || model). With a set head whose offset starts at lambda the loss is 0 from the start and the
   phase ends at its first step; attention and MLP alone have to learn it, and fall short on small models.
3. `--sequence-level`: `planning`, then the set head's offset once more, so that R is the wanted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..base.loading import Base
from ..base.split_model import SplitModel
from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.state import load_random
from ..errors import XFactorError
from ..lora.set_head import SetHead
from ..lora.wrap import add_lora
from ..lowmem.memory import peaks, reset_peak
from ..objective.objectives import TiltedObjective
from ..objective.targets import TiltedTarget
from ..objective.tilt import MAX_STRENGTH
from ..options import LoraOptions, ObjectiveOptions, TrainOptions
from ..sampling.calibration import atom_masses, calibrate, solve
from ..sampling.contexts import OPENING, batches, context_pool, openings
from ..tokens.token_bytes import special_ids
from .loop import Step, optimise
from .rate_run import DISTIL, PLAN, SOLVED, RateRun, tokens_left
from .sequence.phase import plan_texts
from .stopping import plateau

EXACT = 2e-4
"""Nats; a tilt this close to its teacher has nothing left to learn."""


def train_rate(
    base: Base,
    split_model: SplitModel,
    target: TiltedTarget,
    options: TrainOptions,
    lora: LoraOptions,
    objective: ObjectiveOptions,
    on_step: Callable[[Step], None] | None = None,
    checkpointer: Checkpointer | None = None,
) -> RateRun:
    """Wrap `base` with an adapter whose samples hold the wanted rates; see the module.

    Args:
        checkpointer: saves the run when lambda is solved, as it learns the tilt, and after every batch of planning.

    Raises:
        XFactorError: the rates cannot be met together, or training fails.
        Interrupted: a signal stopped a run that has a checkpointer.
    """
    reset_peak(base.device)
    started = time.perf_counter()
    _check_context(base, objective)
    members = target.members(split_model.weight.device)
    banned = sorted(special_ids(base.tokenizer))
    run = RateRun(base, split_model, target, openings(base, 512, seed=options.seed), options.seed, members, banned)
    run.objective = objective
    if checkpointer and checkpointer.start:
        run.restore(checkpointer.start.facts["rate"])
        load_random(checkpointer.start.tensors())
    else:
        run.strengths = _solve(run, objective, options)
    run.note(checkpointer, SOLVED)
    run.wrapped = add_lora(base.model, lora, sets=len(members))
    if lora.head:
        run.head = SetHead(base.model.get_output_embeddings(), members)
        run.head.shift(run.strengths)
    if checkpointer is None or checkpointer.start_phase != PLAN:
        _distil(run, options, objective, on_step, checkpointer)
    if objective.sequence_level:
        plan_texts(run, options, objective, on_step, checkpointer)
    run.model.eval()
    run.seconds, run.peak = time.perf_counter() - started, peaks(base.device)
    return run


def _solve(run: RateRun, objective: ObjectiveOptions, options: TrainOptions) -> torch.Tensor:
    """lambda (K,): given, or solved on contexts and corrected on samples of the tilted base."""
    target = run.target
    if target.rates is None:
        return torch.tensor([goal.strength for goal in target.goals], dtype=torch.float64)
    pool = context_pool(run.base, target.contexts(objective), options.seq_len, seed=options.seed, count=128)
    masses = atom_masses(run.split_model, pool, 1, run.atoms) if pool.shape[1] > 1 else None
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
    checkpointer: Checkpointer | None,
) -> None:
    """Forward KL from the tilted base, until nothing is left or it no longer falls.

    Without a set head the student lags behind its teacher, so at a third, a half and three quarters of the steps the
    teacher's lambda moves by what the student's own samples lack.
    """
    module = TiltedObjective(run.split_model, run.target, run.adapter_off, run.head)
    module.strengths.copy_(run.strengths)
    inputs = batches(run.base, run.target.contexts(objective), options.batch_size, options.seq_len, seed=options.seed)

    lags = run.head is None and run.target.rates is not None
    checks = {options.steps // 3, options.steps // 2, 3 * options.steps // 4} if lags else set()

    def stop(history: list[Step]) -> bool:
        if len(history) in checks:
            module.strengths.copy_(_strengthen(run, module.strengths))
            run.note(checkpointer, DISTIL)
        if history[-1].loss < EXACT:
            run.stopped = f"step {len(history)}: the adapter is the tilt (KL {history[-1].loss:.1e})"
        elif objective.early_stop and plateau([s.loss for s in history]):
            run.stopped = f"step {len(history)}: the loss no longer falls"
        return run.stopped is not None

    run.note(checkpointer, DISTIL)
    run.history = optimise(run.base, run.model, module, inputs, options, on_step, stop, checkpointer)
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


def _check_context(base: Base, objective: ObjectiveOptions) -> None:
    if tokens_left(base, OPENING + 1) < 8:
        raise XFactorError("the model's context is too short to sample from for a rate")
