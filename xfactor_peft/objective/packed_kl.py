"""`kl_loss` and `tilted_kl_loss` for an output embedding that stays packed: pieces of the vocabulary, not of positions.

Unpacking is what a packed embedding costs, so every piece of it meets all positions at once: in a first pass for
log sum exp, in a second for the gradient, which makes the piece's logits again. W is unpacked twice in all, and the
logits alive are those of one piece. The chunked version would unpack it twice for each of its chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from ..lowmem.gguf_layers import PackedMatrix


class TiltedStates(Protocol):
    """`kl.Teacher` or `kl.StateTeacher`."""

    @property
    def hidden(self) -> torch.Tensor: ...

    def bias_of(self, student: torch.Tensor | None) -> torch.Tensor | None: ...

    def tilted(self, logits: torch.Tensor, rows: slice, part: slice) -> torch.Tensor: ...


class Wanted(NamedTuple):
    """P: a target (V,) for all positions, or the tilted softmax of a teacher's states (N, D) through the same W."""

    target: torch.Tensor | None
    teacher: TiltedStates | None = None


class PieceLogits(NamedTuple):
    """Logits of one piece, float32 or better: the student's, and the teacher's where there is one."""

    hidden: torch.Tensor
    bias: torch.Tensor | None
    set_logits: torch.Tensor | None
    members: torch.Tensor
    wanted: Wanted = Wanted(None)

    def student(self, part: slice, w: torch.Tensor) -> torch.Tensor:
        z = self._plain(self.hidden, self.bias, part, w)
        return z if self.set_logits is None else z.addmm_(self.set_logits.to(z), self.members[:, part].to(z))

    def teacher(self, part: slice, w: torch.Tensor) -> torch.Tensor:
        teacher = self.wanted.teacher
        assert teacher is not None  # a fixed target has none
        z = self._plain(teacher.hidden, teacher.bias_of(self.bias), part, w)
        return teacher.tilted(z, slice(0, len(z)), part)

    def _plain(self, states: torch.Tensor, bias: torch.Tensor | None, part: slice, w: torch.Tensor) -> torch.Tensor:
        z = (states @ w.T).to(torch.promote_types(states.dtype, torch.float32))
        return z if bias is None else z.add_(bias[part])


class PackedKL(torch.autograd.Function):
    """Loss and masses (K,) as in `kl._ChunkedKL`, with W packed; gradients for hidden, bias and set_logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: PackedMatrix,
        bias: torch.Tensor | None,
        set_logits: torch.Tensor | None,
        wanted: Wanted,
        members: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            loss, mass, gradients = _passes(PieceLogits(hidden, bias, set_logits, members, wanted), weight)
        given = (hidden, bias, set_logits)
        ctx.save_for_backward(
            *(None if g is None or x is None else g.to(x.dtype) for g, x in zip(gradients, given, strict=True))
        )
        ctx.mark_non_differentiable(mass)
        return loss, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_mass: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, bias, set_logits = (None if g is None else g * grad_loss for g in ctx.saved_tensors)
        return hidden, None, bias, set_logits, None, None


_Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def _passes(logits: PieceLogits, weight: PackedMatrix) -> tuple[torch.Tensor, torch.Tensor, _Gradients]:
    """Loss, masses, and gradients for hidden, bias and set_logits, float32 or better."""
    hidden, bias, set_logits, members, wanted = logits
    positions, exact = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
    target, members = wanted.target, members.to(exact)
    total = hidden.new_full((positions,), float("-inf"), dtype=exact)
    total_wanted, loss = total.clone(), hidden.new_zeros((), dtype=exact)
    for part, w in weight.pieces(hidden.dtype):
        total = torch.logaddexp(total, logits.student(part, w).logsumexp(1))
        if target is None:
            total_wanted = torch.logaddexp(total_wanted, logits.teacher(part, w).logsumexp(1))
    mass = hidden.new_zeros(len(members), dtype=exact)
    grad_hidden = torch.zeros_like(hidden, dtype=exact)
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
    grad_set = None if set_logits is None else torch.zeros_like(set_logits, dtype=exact)
    for part, w in weight.pieces(hidden.dtype):
        log_q = logits.student(part, w).sub_(total[:, None])
        if target is None:
            log_p = logits.teacher(part, w).sub_(total_wanted[:, None])
            p = log_p.exp()
            loss += (p * log_p.sub_(log_q)).sum()
        else:
            p = target[part].to(exact)
            loss += positions * torch.special.xlogy(p, p).sum() - (log_q @ p).sum()
        q = log_q.exp_()
        mass += (q @ members[:, part].T).sum(0)
        difference = q.sub_(p).div_(positions)
        if grad_bias is not None:
            grad_bias[part] = difference.sum(0)
        if grad_set is not None:
            grad_set += difference @ members[:, part].T
        grad_hidden += difference.to(hidden.dtype) @ w
    return loss / positions, mass / positions, (grad_hidden, grad_bias, grad_set)
