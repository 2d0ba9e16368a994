"""Several processes, as `accelerate launch` or torchrun start them: every one trains, one prints and writes.

All processes hold the whole model and draw the same batches; each keeps its rows, and DistributedDataParallel averages
the gradients. So N processes make the steps of one process with the same `batch_size`, which counts all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import XFactorError
from ..options import TrainOptions

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator


def process() -> tuple[int, int]:
    """(this process's number, how many there are); (0, 1) when nobody launched several."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_processes(options: TrainOptions) -> None:
    """Raises XFactorError for a batch that cannot be divided evenly, or for sharding in a single process."""
    count = process()[1]
    if options.fsdp and count == 1:
        raise XFactorError("`fsdp=True` needs several processes: accelerate launch --config_file ...")
    if options.batch_size % count:
        raise XFactorError(
            f"`batch_size={options.batch_size}` must be a multiple of the {count} processes, which share it"
        )


def own_rows(ids: torch.Tensor) -> torch.Tensor:
    """Every N-th row of a batch (B, T), beginning with this process's number."""
    rank, count = process()
    return ids[rank::count]


def mean_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """Each value's mean over all processes."""
    if process()[1] == 1:
        return list(values)
    import torch

    return accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "mean").tolist()


def end_group() -> None:
    """End the process group, if there is one, with time for its threads to free the tensors that they still hold.

    destroy_process_group does not join gloo's threads while anything refers to the group, and DTensor's caches do. A
    thread frees a tensor of Python's under the interpreter's lock; when it asks for that after Python has ended, the
    whole process dies of "terminate called without an active exception".
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()
        time.sleep(0.2)  # without the lock, so that a thread that waits for it has it


def end_group_at_exit() -> None:
    """Have `end_group` called before Python ends; nothing in a process that nobody launched with others."""
    if process()[1] > 1:
        atexit.unregister(end_group)
        atexit.register(end_group)


@contextlib.contextmanager
def own_output(output: Path) -> Iterator[Path]:
    """Where this process writes: `output` for the first one, a folder that is thrown away for the others."""
    if process()[0] == 0:
        yield output
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / output.name


@contextlib.contextmanager
def quiet_unless_first() -> Iterator[None]:
    """Nothing is printed inside, except by the first process."""
    if process()[0] == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
