"""When memory runs out in training: what counts as that, and which settings would have fitted."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..errors import XFactorError
from ..lowmem.memory import mib
from ..options import MemoryOptions
from .memory_model import free_memory, resident
from .plan import make_plan

if TYPE_CHECKING:
    from ..base.loading import Base
    from .dry_run import Shape

OUT_OF_MEMORY = (MemoryError, RuntimeError)
_WORDS = ("not enough memory", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's own error, CUDA's, or the CPU allocator's, which is a plain RuntimeError."""
    if isinstance(error, RuntimeError):
        return any(words in str(error).lower() for words in _WORDS)
    return isinstance(error, MemoryError)


def explain(base: Base, shape: Shape, grad_accum: int, *, error: BaseException, resume_hint: str = "") -> str:
    """One line: where memory ran out, and the mildest change of settings that is predicted to need less.

    Args:
        shape: the run that did not fit; what is advised needs less than 90 % of what is predicted for it.
    """
    start = f"out of memory at {error or 'training'}, {mib(free_memory(base.device))} free now"
    source = base.choice.gguf or base.choice.folder
    planned = partial(
        make_plan, source, shape, grad_accum=grad_accum, time=False, baseline=resident(mapped=shape.mapped)
    )
    try:
        plan = planned()
        advice = planned(MemoryOptions("on", int(min(0.9 * plan.memory.total, plan.budget)))).advice
    except XFactorError:
        return f"{start}; halve `batch_size`, double `grad_accum`, or pass `auto_batch=True`{resume_hint}"
    halved = f"`checkpointing=on` `batch_size={max(1, shape.batch // 2)}` `grad_accum={2 * grad_accum}`"
    changes = " or ".join(f"{settings} (about {mib(total)})" for settings, total in advice) or halved
    return f"{start}; try {changes}, or `auto_batch=True`{resume_hint}"
