"""The loop itself: gradients of micro-batches, checks, an optimiser's step, a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from ..budget.out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from ..checkpoint.state import Step, Stream, TrainingState
from ..errors import XFactorError
from ..options import TrainOptions
from .optimizers import build_optimizer
from .parallel import end_group_at_exit, mean_over_processes, own_rows
from .run import TrainingRun
from .sharding import ShardedCopy, whole_tensor


def optimise(
    run: TrainingRun,
    objective: nn.Module,
    *,
    stop: Callable[[list[Step]], bool] = lambda _: False,
    sharded: ShardedCopy | None = None,
) -> None:
    """Adam on `objective` over the run's batches, for at most its `steps`, into its history; `stop` looks at each step.

    Args:
        sharded: the model, when its weights are to be sharded over the processes.

    Raises:
        XFactorError: a loss or gradient that is not finite, gradients that are all 0, LoRA that does not move.
        MemoryError: also for the allocators' own errors.
        Interrupted: a signal came, and the state is saved.
    """
    options, hooks, base = run.recipe.train, run.hooks, run.base
    full_bf16 = options.method == "full" and base.dtype == "bf16"
    AcceleratorState._reset_state()  # it would hold on to the precision of the first run in this process
    accelerator = Accelerator(mixed_precision="bf16" if full_bf16 else "no", cpu=base.device.type == "cpu")
    end_group_at_exit()
    if sharded:
        sharded.shard(objective, accelerator.device)
    trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(
        options.optimizer, trainable.values(), options.learning_rate, options.weight_decay,
        lora_plus=objective if options.method == "lora" and run.lora.variant == "lora+" else None,
    )  # fmt: skip
    if not sharded:
        objective, optimizer = accelerator.prepare(objective, optimizer)
    state = TrainingState(trainable, optimizer, Stream(run.batches()), run.history)
    run.model.train()
    hooks.checkpointer.restore(state)
    with hooks.checkpointer.deferred():
        for step in range(len(run.history), options.steps):
            started = time.perf_counter()
            value, mass = _gradients(accelerator, objective, state, options)
            norm = _norm(trainable)
            run.history.append(Step(step, value, mass, norm, time.perf_counter() - started))
            if stop(run.history):
                hooks.on_step(run.history[-1])
                break
            _check_step(run.history[-1], hooks.checkpointer.resume_hint(), run)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0 and options.method == "lora":
                _check_moved(trainable)
            run.history[-1] = replace(run.history[-1], seconds=time.perf_counter() - started)
            hooks.on_step(run.history[-1])
            hooks.checkpointer.after_step(state, last=step + 1 == options.steps)
    if sharded:
        sharded.gather()
    run.model.eval()


def plateau(losses: list[float], window: int = 100, least: float = 0.01) -> bool:
    """Whether the mean of the last `window` losses is not lower by `least` (a share) than that of the window before."""
    if len(losses) < 2 * window:
        return False
    recent, earlier = sum(losses[-window:]), sum(losses[-2 * window : -window])
    return recent > (1 - least) * earlier


def _gradients(
    accelerator: Accelerator, objective: nn.Module, state: TrainingState, options: TrainOptions
) -> tuple[float, float]:
    """Gradients of a step's mean loss; with `auto_batch`, halved and halved again until they fit into memory."""
    batches = [own_rows(state.inputs.draw()) for _ in range(options.grad_accum)]
    while True:
        try:
            return _accumulate(accelerator, objective, batches, state.rows)
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            rows = state.rows or options.batch_size
            if rows == 1 or not options.auto_batch:
                raise MemoryError(f"step {len(state.history)}: {rows} x {options.seq_len} tokens") from error
        state.rows = rows // 2  # outside of the handler, whose traceback holds on to the tensors
        state.optimizer.zero_grad(set_to_none=True)


def _accumulate(
    accelerator: Accelerator, objective: nn.Module, batches: list[torch.Tensor], rows: int | None
) -> tuple[float, float]:
    """Gradients of the mean loss over all sequences, at most `rows` at a time; returns that loss and the set mass."""
    parts = [part for ids in batches for part in (ids.split(rows) if rows else [ids])]
    total, loss_sum, mass_sum = sum(len(ids) for ids in batches), 0.0, 0.0
    for index, ids in enumerate(parts):
        share = len(ids) / total
        with nullcontext() if index == len(parts) - 1 else accelerator.no_sync(objective):
            with accelerator.autocast():
                loss, mass = objective(ids.to(accelerator.device))
            accelerator.backward(loss * share)
        loss_sum, mass_sum = loss_sum + loss.item() * share, mass_sum + mass.item() * share
    loss_sum, mass_sum = mean_over_processes(accelerator, loss_sum, mass_sum)
    return loss_sum, mass_sum


def _norm(trainable: dict[str, nn.Parameter]) -> float:
    gradients = [p.grad for p in trainable.values() if p.grad is not None]
    return float(whole_tensor(nn.utils.get_total_norm(gradients)))


def _check_step(made: Step, resume_hint: str, run: TrainingRun) -> None:
    if not (math.isfinite(made.loss) and math.isfinite(made.grad_norm)):
        found = f"step {made.step}: loss {made.loss:g}, gradient norm {made.grad_norm:g}"
        raise XFactorError(f"{found}; {_cause(run, made)}{resume_hint}")
    if made.grad_norm == 0:
        raise XFactorError(f"step {made.step}: every gradient is 0, so nothing can be learnt; please report this model")


def _cause(run: TrainingRun, made: Step) -> str:
    """What to do about values that are not finite: nothing was updated before step 0, and frozen weights never are."""
    weights = run.base.model.named_parameters()
    frozen = (name for name, p in weights if not p.requires_grad and p.is_floating_point() and not p.isfinite().all())
    if (broken := next(frozen, None)) is not None:
        return f"the base's own {broken.replace('.base_layer', '')} is not finite; take another copy of `model`"
    if made.step == 0:
        return "nothing was updated yet, so it is the base that gives it; use `dtype=fp32` or another copy of `model`"
    return "lower `lr` or use `dtype=fp32`"


def _check_moved(trainable: dict[str, nn.Parameter]) -> None:
    """B starts at 0 and has a gradient in the first step, so it must have moved after it."""
    b_sides = [whole_tensor(p.detach()) for name, p in trainable.items() if "lora_B" in name]
    if b_sides and not any(side.any() for side in b_sides):
        raise XFactorError("LoRA's B is still 0 after the first step: nothing is learnt; raise `lr`")
