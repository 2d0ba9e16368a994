"""D_KL(P || softmax(W h + b)) without ever making the (B*T) x V tensor of logits.

Positions go through in chunks. Each chunk makes its own logits, in the dtype of the product, and turns them in place
into the gradient softmax(z) - P, a piece at a time in float32; the gradient is reduced to what backward needs:

    KL        = sum_i P_i log P_i - sum_i P_i log q_i,      log q = z - logsumexp(z),  z = W h + b
    dKL/dh    = W^T (q - P)             (N, D)
    dKL/dW    = (q - P)^T h             (V, D), only when W trains
    dKL/db    = sum over positions of (q - P)

So W is read twice a chunk. It is the largest matrix, and may be mapped from disk: chunks are large, and pieces are
small. A packed W goes another way (see `packed_kl`).

The eager twin is `reference.kl_loss`. The idea of fusing the output embedding into the loss is that of
Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv:2411.09009).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..lowmem.gguf_layers import PackedMatrix
from .packed_kl import PackedKL, Wanted

CHUNK_BYTES = 16 * 2**20
"""Size of a chunk of float32 logits where nothing is stored of them."""
LOGITS_BYTES = 32 * 2**20
"""Size of the logits of one chunk of the loss, in the product's dtype; a teacher's are counted among them."""
PIECE_BYTES = 4 * 2**20
"""Size of the float32 logits of a piece of them; about three such buffers are alive at once."""


class KLResult(NamedTuple):
    """Mean KL in nats per position (differentiable) and mean mass q(S) (detached); both scalars, float32."""

    loss: torch.Tensor
    set_mass: torch.Tensor


def chunk_positions(vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many positions fit into one chunk of float32 logits; at least 1."""
    return max(1, chunk_bytes // (4 * vocab_size))


def loss_positions(entries: int, dtype: torch.dtype) -> int:
    """How many positions of so many logits each make a chunk of the loss; at least 1."""
    return max(1, LOGITS_BYTES // (dtype.itemsize * entries))


def _no_autocast(device: str) -> AbstractContextManager[None]:
    """Autocast may make the logits in bfloat16, but it is not to round log-probabilities and gradients."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _ChunkedKL(torch.autograd.Function):
    """Both targets in one loop: `target` is P itself (V,), or None when `teacher` makes it chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, set_logits, target, teacher, members, chunk):
        positions = hidden.shape[0]
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        members = members.to(accumulate)
        if target is not None:
            target = target.to(accumulate)
            entropy = torch.special.xlogy(target, target).sum()
        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        mass = torch.zeros(len(members), dtype=accumulate, device=hidden.device)
        want_hidden, want_weight, want_bias, want_set = ctx.needs_input_grad[:4]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if want_bias else None
        grad_set = torch.empty_like(set_logits) if want_set else None
        for start in range(0, positions, chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight, bias).to(weight.dtype)
            wanted_logits = None if teacher is None else F.linear(teacher.hidden[rows], weight, teacher.bias_of(bias))
            piece = chunk_positions(len(weight), PIECE_BYTES)
            for first in range(0, len(logits), piece):
                part = slice(first, min(first + piece, len(logits)))
                there = slice(start + part.start, start + part.stop)
                with _no_autocast(hidden.device.type):
                    z = logits[part].to(accumulate)
                    if set_logits is not None:
                        z.addmm_(set_logits[there].to(accumulate), members)
                    z -= z.logsumexp(dim=1, keepdim=True)
                    if wanted_logits is None:
                        loss += len(z) * entropy - (z @ target).sum()
                        wanted = target
                    else:
                        log_wanted = teacher.tilted(wanted_logits[part].to(accumulate), there).log_softmax(dim=1)
                        wanted = log_wanted.exp()
                        loss += (wanted * log_wanted.sub_(z)).sum()
                    q = z.exp_()
                    mass += (q @ members.T).sum(0)
                    difference = q.sub_(wanted).div_(positions)
                    if grad_bias is not None:
                        grad_bias += difference.sum(0)
                    if grad_set is not None:
                        grad_set[there] = difference @ members.T
                    logits[part] = difference
            with _no_autocast(hidden.device.type):
                if grad_hidden is not None:
                    grad_hidden[rows] = logits @ weight
                if grad_weight is not None:
                    grad_weight += logits.T @ hidden[rows].to(weight.dtype)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            grad_set,
        )
        mass = mass / positions
        ctx.mark_non_differentiable(mass)
        return loss / positions, mass

    @staticmethod
    def backward(ctx, grad_loss, _grad_mass):
        grads = [None if g is None else g * grad_loss for g in ctx.saved_tensors]
        return (*grads, None, None, None, None)


class Teacher(NamedTuple):
    """The tilted base, as hidden states: log q = log_softmax(W h_base + b + tilt), b the student's too.

    Attributes:
        hidden: (N, D), the base's states at the same positions, without gradient.
        tilt: (V,), sum_k lambda_k 1[i in S_k].
    """

    hidden: torch.Tensor
    tilt: torch.Tensor

    def bias_of(self, student: torch.Tensor | None) -> torch.Tensor | None:
        """b of the teacher, from the student's."""
        return student

    def tilted(self, logits: torch.Tensor, rows: slice, part: slice = slice(0, None)) -> torch.Tensor:
        """Logits of some positions and some of the vocabulary, tilted in place."""
        return logits.add_(self.tilt[part])


class StateTeacher(NamedTuple):
    """A base tilted by what was said so far: log q = log_softmax(W h_base + b + t), t on some tokens.

    Attributes:
        hidden: (N, D), the base's states at the same positions, without gradient; bias: b (V,), or None.
        tokens: (T,), the ids that have a weight; weights: (N, T), their log weights.
    """

    hidden: torch.Tensor
    bias: torch.Tensor | None
    tokens: torch.Tensor
    weights: torch.Tensor

    def bias_of(self, student: torch.Tensor | None) -> torch.Tensor | None:
        """b of the teacher: its own."""
        return self.bias

    def tilted(self, logits: torch.Tensor, rows: slice, part: slice = slice(0, None)) -> torch.Tensor:
        """As `Teacher.tilted`."""
        here = (self.tokens >= part.start) & (self.tokens < part.start + logits.shape[1])
        return logits.index_add_(1, self.tokens[here] - part.start, self.weights[rows][:, here].to(logits))


def kl_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor | PackedMatrix,
    target: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk: int | None = None,
) -> KLResult:
    """Mean D_KL(P || softmax(W h + b)) over positions, in chunks; gradients for hidden, weight and bias.

    Args:
        hidden: (..., D), the states that enter the output embedding.
        weight: (V, D), the output embedding W. Its gradient is made only when it requires one.
        target: (V,), P, summing to 1.
        mask: (V,) bool, membership in S; only for the reported mass.
        bias: (V,) or None.
        chunk: positions per chunk; by default as many as fit `LOGITS_BYTES`.

    Returns:
        KLResult(loss, set_mass). Loss and softmax are in float32 or better whatever the inputs' dtype.

    Raises:
        ValueError: the shapes do not fit together, or there is no position.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    vocab_size = weight.shape[0]
    if flat.shape[0] == 0:
        raise ValueError("kl_loss needs at least one position")
    if flat.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has width {flat.shape[1]}, the output embedding {weight.shape[1]}")
    for name, vector in (("target", target), ("mask", mask), ("bias", bias)):
        if vector is not None and vector.shape != (vocab_size,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected ({vocab_size},)")
    if isinstance(weight, PackedMatrix):
        loss, mass = PackedKL.apply(flat, weight, bias, None, Wanted(target), mask[None])
        return KLResult(loss, mass[0])
    chunk = chunk or loss_positions(vocab_size, weight.dtype)
    loss, mass = _ChunkedKL.apply(flat, weight, bias, None, target, None, mask[None], chunk)
    return KLResult(loss, mass[0])


def tilted_kl_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor | PackedMatrix,
    teacher: Teacher | StateTeacher,
    members: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    set_logits: torch.Tensor | None = None,
    chunk: int | None = None,
) -> KLResult:
    """Mean D_KL(q || softmax(W h + b + F^T s)) over positions, in chunks; q is the tilted base.

        dKL/ds_k = sum over i in S_k of (student_i - q_i)         (N, K)

    Args:
        hidden: (..., D), the student's states.
        weight: (V, D), shared by student and teacher.
        teacher: the base's states (N, D) and its tilt, for all positions or by state.
        members: F, (K, V): 0/1, or any term of low rank of the student's; it gets no gradient.
        bias: (V,) or None; a `StateTeacher` has its own.
        set_logits: s, (..., K): what the student's set head adds to the logits of each set; None without one.
        chunk: as in `kl_loss`.

    Returns:
        KLResult(loss, set_mass) with one mean mass a set, (K,).

    Raises:
        ValueError: the shapes do not fit together, or there is no position.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if flat.shape[0] == 0:
        raise ValueError("tilted_kl_loss needs at least one position")
    if teacher.hidden.shape != flat.shape:
        raise ValueError(f"teacher has {tuple(teacher.hidden.shape)} states, the student {tuple(flat.shape)}")
    tilt = members[0] if isinstance(teacher, StateTeacher) else teacher.tilt
    if members.shape[1:] != tilt.shape or len(tilt) != len(weight):
        raise ValueError(f"members {tuple(members.shape)} and tilt {tuple(tilt.shape)} need {len(weight)} tokens")
    if isinstance(teacher, StateTeacher) and teacher.weights.shape != (len(flat), len(teacher.tokens)):
        raise ValueError(f"weights {tuple(teacher.weights.shape)} of {len(flat)} states, {len(teacher.tokens)} tokens")
    if set_logits is not None:
        set_logits = set_logits.reshape(len(flat), len(members))
    if isinstance(weight, PackedMatrix):
        return KLResult(*PackedKL.apply(flat, weight, bias, set_logits, Wanted(None, teacher), members))
    chunk = chunk or loss_positions(2 * len(weight), weight.dtype)
    return KLResult(*_ChunkedKL.apply(flat, weight, bias, set_logits, None, teacher, members, chunk))
