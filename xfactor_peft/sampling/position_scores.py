"""KL from the base at every generated position, whole and in its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from ..base.split_model import SplitModel
from ..objective.kl import chunk_positions

SCORE_BYTES = 4 * 2**20
"""Size of one chunk's float32 logits, of which about ten are alive at once where a set head makes its own. Four times
the size takes four times the memory and saves a seventh of the time."""


@dataclass(frozen=True)
class PositionScores:
    """One float32 value a position, (n,); policy pi, base p, set S, m = pi(S).

    The chain rule splits KL(pi||p) exactly into three parts that add up to it:

        kl_mass    = KL((m, 1-m) || (p(S), 1-p(S)))         how much of the set
        kl_inside  = m     KL(pi(.|S) || p(.|S))            which members ("it only says Xbox")
        kl_outside = (1-m) KL(pi(.|not S) || p(.|not S))    damage to everything else

    Attributes:
        outside: the last factor alone, KL(pi(.|not S) || p(.|not S)).
        base_nll: -log p(x) of the token that was sampled.
    """

    mass: torch.Tensor
    kl: torch.Tensor
    kl_mass: torch.Tensor
    kl_inside: torch.Tensor
    kl_outside: torch.Tensor
    outside: torch.Tensor
    base_nll: torch.Tensor

    @classmethod
    def join(cls, parts: list[PositionScores]) -> PositionScores:
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@torch.no_grad()
def score_positions(
    policy: SplitModel,
    hidden: torch.Tensor,
    base_hidden: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    base_logits: Callable[[torch.Tensor], torch.Tensor] | None,
) -> PositionScores:
    """Score n positions in chunks; (n, D) states of both, (n,) sampled ids, (V,) bool set.

    `base_logits` makes the base's logits from its states (with the adapter off where both share weights); None
    where the policy is the base itself.
    """
    step = chunk_positions(len(policy.weight), SCORE_BYTES)
    members = mask.nonzero().squeeze(1)
    parts = []
    for part in (slice(start, start + step) for start in range(0, len(hidden), step)):
        log_pi = _log_softmax(policy.logits(hidden[part]))
        log_p = log_pi.clone() if base_logits is None else _log_softmax(base_logits(base_hidden[part]))
        parts.append(_split(log_pi, log_p, ids[part], members))
    return PositionScores.join(parts)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Float32, in place where the logits are float32 already."""
    z = logits.float()
    return z.sub_(z.logsumexp(1, keepdim=True))


def _split(log_pi: torch.Tensor, log_p: torch.Tensor, ids: torch.Tensor, members: torch.Tensor) -> PositionScores:
    """Uses its arguments up: three tensors (n, V) are alive at once."""
    base_nll = -log_p.gather(1, ids[:, None]).squeeze(1)
    pi = log_pi.exp()
    terms = torch.where(pi > 0, log_pi.sub_(log_p), 0.0).mul_(pi)  # -inf - -inf where a policy bans a token
    kl, inside = terms.sum(1), terms[:, members].sum(1)
    m, others = _on_and_off(pi, members)
    base_m, base_others = _on_and_off(log_p.exp_(), members)
    in_mass = torch.special.xlogy(m, m / base_m.clamp(min=1e-30))
    out_mass = torch.special.xlogy(others, others / base_others.clamp(min=1e-30))
    outside = kl - inside - out_mass
    return PositionScores(
        mass=m,
        kl=kl,
        kl_mass=in_mass + out_mass,
        kl_inside=inside - in_mass,
        kl_outside=outside,
        outside=outside / others.clamp(min=1e-6),
        base_nll=base_nll,
    )


def _on_and_off(p: torch.Tensor, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass on the set and off it, summed rather than as 1 - m, which loses digits when m is near 1; uses p up."""
    inside = p[:, members].sum(1)
    return inside, p.index_fill_(1, members, 0.0).sum(1)
