"""The loop itself: gradients of micro-batches, checks, an optimiser's step, a checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from ..budget.out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from ..checkpoint.state import Stream, TrainingState
from ..errors import XFactorError
from ..lora.wrap import lora_b_norm
from .optimizers import build_optimizer
from .parallel import check_rows, end_group_at_exit, mean_over_processes, own_rows
from .sharding import ShardedCopy, whole_tensor

if TYPE_CHECKING:
    from ..base.loading import Base
    from ..checkpoint.checkpointer import Checkpointer
    from ..options import TrainOptions


@dataclass(frozen=True)
class Step:
    """One optimisation step: mean KL (nats), mass on S, gradient norm, seconds."""

    step: int
    loss: float
    set_mass: float
    grad_norm: float
    seconds: float


def optimise(
    base: Base,
    model: nn.Module,
    objective: nn.Module,
    inputs: Iterator[torch.Tensor],
    options: TrainOptions,
    on_step: Callable[[Step], None] | None = None,
    stop: Callable[[list[Step]], bool] | None = None,
    checkpointer: Checkpointer | None = None,
    sharded: ShardedCopy | None = None,
) -> list[Step]:
    """Adam on `objective` over batches of ids, for at most `options.steps` steps; `stop` looks at every step.

    Args:
        checkpointer: saves the run and brings it to where it was saved.
        sharded: the model, when its weights are to be shared out among the processes.

    Raises:
        XFactorError: a loss or gradient that is not finite, gradients that are all 0, LoRA that does not move.
        MemoryError: also for the allocators' own errors.
        Interrupted: a signal came, and the state is saved.
    """
    check_rows(options.batch_size)
    full_bf16 = options.method == "full" and base.dtype == "bf16"
    AcceleratorState._reset_state()  # it would hold on to the precision of the first run in this process
    accelerator = Accelerator(mixed_precision="bf16" if full_bf16 else "no", cpu=base.device.type == "cpu")
    end_group_at_exit()
    if sharded:
        sharded.shard(objective, accelerator.device)
    trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(options.optimizer, trainable.values(), options.learning_rate, options.weight_decay)
    if not sharded:
        objective, optimizer = accelerator.prepare(objective, optimizer)
    state = TrainingState(trainable, optimizer, Stream(inputs))
    model.train()
    if checkpointer:
        checkpointer.restore(state)
    history = state.history
    with checkpointer.deferred() if checkpointer else nullcontext():
        for step in range(len(history), options.steps):
            started = time.perf_counter()
            value, mass = _gradients(accelerator, objective, state, options)
            norm = _norm(trainable)
            history.append(Step(step, value, mass, norm, time.perf_counter() - started))
            if stop and stop(history):
                if on_step:
                    on_step(history[-1])
                break
            _check_step(step, value, norm, checkpointer.resume_hint() if checkpointer else "")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == 0 and options.method == "lora":
                _check_moved(model, trainable)
            history[-1] = replace(history[-1], seconds=time.perf_counter() - started)
            if on_step:
                on_step(history[-1])
            if checkpointer:
                checkpointer.after_step(state, last=step + 1 == options.steps)
    if sharded:
        sharded.gather()
    model.eval()
    return history


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


def _check_step(step: int, loss: float, norm: float, resume_hint: str) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise XFactorError(
            f"step {step}: loss {loss:g}, gradient norm {norm:g}; lower --lr or use --dtype fp32{resume_hint}"
        )
    if norm == 0:
        raise XFactorError(f"step {step}: every gradient is 0, so nothing can be learnt; please report this model")


def _check_moved(model: nn.Module, trainable: dict[str, nn.Parameter]) -> None:
    """B starts at 0 and has a gradient in the first step, so it must have moved after it."""
    if any("lora_B" in name for name in trainable) and lora_b_norm(model) == 0:
        raise XFactorError("LoRA's B is still 0 after the first step: nothing is learnt; raise --lr")
