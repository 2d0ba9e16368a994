"""Peak memory of a training run, from what a dry run of one step counts.

    peak = baseline + weights + 16 n + saved + workspace

n numbers train with a float32 value, a gradient and Adam's two moments each (4 + 4 + 8 bytes; in full fine-tuning the
value is among the weights already). A recomputed block keeps its input alone, and one of them at a time is whole again:

    saved = rest + sum over the last blocks of what they save + k block_input + (one block, if k > 0)

`workspace` is what comes and goes: the loss's chunks, the scratch buffers of quantised layers, the gradients on their
way through a block. They add up although they are not alive at once: what a step saves later lies in the holes that an
earlier one left, so a chunk finds no room there the next time. On a CPU `baseline` is what the process holds before it
loads anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from ..lowmem.gguf_layers import PIECE as GGUF_PIECE
from ..lowmem.int8_matmul import PRODUCT_BYTES
from ..objective.kl import LOGITS_BYTES, PIECE_BYTES
from .control_groups import left_by_groups
from .dry_run import Shape, StepMemory

LOSS_CHUNKS = {False: 3.5, True: 5.5}
"""Buffers of one piece of logits that are alive at once: without and with a teacher's beside the student's."""
BLOCK_TENSORS = 6
"""Tensors of the MLP's width, in the computation's dtype, that one block's backward holds besides what was saved."""
KERNELS = 16 * 2**20
"""Compiled kernels and code pages that stay: once with the first product on a CPU, and again with every kind of phase,
whose products have shapes of their own (oneDNN keeps them)."""

PAGES = 48 * 2**20
"""What a run with mapped weights needs of the page cache at every moment: code, and the layers at hand."""


@dataclass(frozen=True)
class Prediction:
    """Bytes, part by part; `total` is the peak."""

    baseline: int
    weights: int
    trained: int
    saved: int
    workspace: int

    @property
    def total(self) -> int:
        return self.baseline + self.weights + self.trained + self.saved + self.workspace


def runtime(kinds: int) -> int:
    """Bytes that compiled kernels take once `kinds` kinds of phases have computed something on a CPU."""
    return KERNELS * (1 + kinds)


def predict(step: StepMemory, shape: Shape, recomputed: int, *, baseline: int, kinds: int = 2) -> Prediction:
    """Peak of a run in which the first `recomputed` blocks are checkpointed; `baseline` is 0 on CUDA.

    `kinds` are the kinds of phases so far, this one included; usually R was measured before.
    """
    blocks = step.blocks[recomputed:]
    again = max(step.blocks[:recomputed], default=0)
    saved = step.rest + sum(blocks) + recomputed * step.block_input + again
    full = shape.method == "full"
    trained = step.trainable * (12 if full else 16)
    if full and shape.dtype == "bf16":
        trained += 2 * step.trainable  # the bf16 copies that autocast makes and keeps through the step
    workspace = _workspace(step, shape) + (runtime(kinds) if baseline else 0)
    return Prediction(baseline, step.weights, trained, saved, workspace)


def _workspace(step: StepMemory, shape: Shape) -> int:
    positions = shape.batch * shape.length
    every = positions * step.vocab_size
    if shape.quantization == "gguf":  # a piece of the vocabulary, float32
        stored, piece = 0, 4 * positions * min(step.vocab_size, GGUF_PIECE // step.width)
    else:
        stored = min(LOGITS_BYTES, (4 if shape.dtype == "fp32" else 2) * every * (1 + shape.teacher))
        piece = min(PIECE_BYTES, 4 * every)
    loss = stored + LOSS_CHUNKS[shape.teacher] * piece + 4 * positions * step.width
    block = block_workspace(step, shape)
    if shape.method == "full":  # the output embedding's gradient: summed up, in its own dtype, and a share of it
        loss += 3 * 4 * step.vocab_size * step.width
    return int(loss + block) + scratch_bytes(step, shape)


def block_workspace(step: StepMemory, shape: Shape) -> int:
    """Tensors that come and go in one block."""
    return BLOCK_TENSORS * shape.batch * shape.length * 4 * step.width * (4 if shape.dtype == "fp32" else 2)


def scratch_bytes(step: StepMemory, shape: Shape) -> int:
    """Buffers that quantised layers share: float32 and int32 products with int8 codes, or one dequantised weight."""
    outputs = shape.batch * shape.length * 4 * step.width
    if shape.quantization == "int8":
        piece = min(PRODUCT_BYTES, 4 * outputs)
        return 3 * piece + piece // 4
    if shape.quantization == "gguf":
        return 2 * GGUF_PIECE * (4 if shape.dtype == "fp32" else 2)
    if shape.quantization == "nf4":
        return 4 * step.width * step.width * (4 if shape.dtype == "fp32" else 2)
    return 0


def resident(*, mapped: bool = False) -> int:
    """Bytes that this process has in memory now; with mapped weights, what cannot be taken back, and `PAGES`."""
    now = psutil.Process().memory_info()
    return now.rss - file_pages() + PAGES if mapped else now.rss


def file_pages() -> int:
    """Bytes of files in this process's memory, code among them; 0 where the system does not say."""
    return getattr(psutil.Process().memory_info(), "shared", 0)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take: of the GPU, or of the machine within its control groups' limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *left_by_groups()])


def blocks_to_recompute(step: StepMemory, shape: Shape, budget: int, *, baseline: int) -> int | None:
    """The smallest number of checkpointed blocks whose predicted peak is within `budget` bytes; None if none is."""
    counts = range(len(step.blocks) + 1)
    return next((n for n in counts if predict(step, shape, n, baseline=baseline).total <= budget), None)
