"""Beyond the myopic tilt: the policy that plans for the tokens it likes.

A constant logit bias is optimal for given contexts, but it does not choose contexts. Over whole texts the optimum is

    p*(x) proportional to p(x) exp(lambda count_S(x)),

the maximum of  E_pi[ sum_t r_t ],  r_t = lambda 1[x_t in S] - log pi(x_t|c_t) / p(x_t|c_t):  KL-regularised
reinforcement learning with a dense reward and no discount (Todorov 2009; for language models Korbak et al. 2022, "RL
with KL penalties is better viewed as Bayesian inference", arXiv:2205.11275). Its gradient at one position is

    sum_i grad pi(i|c_t) (lambda 1[i in S] - log pi(i|c_t)/p(i|c_t))  +  A_t grad log pi(x_t|c_t).

The first term, what the next token itself is worth, is taken exactly over the whole vocabulary. Only the second, what
it does to the rest of the text, is a score-function estimate; its advantage A_t sums differences of a learnt value of
*expected* rewards r_t = lambda m(c_t) - KL(pi||p | c_t), again exact (generalised advantage estimation, Schulman et
al. 2016, arXiv:1506.02438, discount 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..lowmem.gguf_layers import PackedMatrix
from .kl import chunk_positions
from .packed_kl import PieceLogits


class Worth(NamedTuple):
    """What a token is worth at n positions beside its KL: members F (K, V), strengths lambda (n, K), price w."""

    members: torch.Tensor
    strengths: torch.Tensor
    outside_price: float = 0.0


class PositionGradients(NamedTuple):
    """What one pass over the logits leaves of each position (n = N * T).

    `mass` (n, K) and `kl` (n,) are m_k(c) and KL(pi||p | c), `outside` (n,) is KL_out where it has a price, else 0. The
    gradient of the objective with respect to the hidden state is `now_hidden` + A `score_hidden`, and likewise for the
    set logits; no (n, V) tensor outlives its chunk.
    """

    mass: torch.Tensor
    kl: torch.Tensor
    outside: torch.Tensor
    now_hidden: torch.Tensor
    score_hidden: torch.Tensor
    now_set: torch.Tensor
    score_set: torch.Tensor


@torch.no_grad()
def position_gradients(
    hidden: torch.Tensor,
    base_hidden: torch.Tensor,
    weight: torch.Tensor | PackedMatrix,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    set_logits: torch.Tensor | None,
    worth: Worth,
) -> PositionGradients:
    """Exact expectations over the vocabulary at n positions, in chunks.

    With z the policy's logits, g(i) = sum_k lambda_k F_k(i) - log pi(i)/p(i) - w 1[i not in S] log pi_o(i)/p_o(i) and
    J = sum_i pi(i) g(i):

        dJ/dz_i = pi(i) (g(i) - J),        d log pi(x)/dz_i = 1[i = x] - pi(i).

    Args:
        hidden: (n, D), the policy's states; base_hidden: (n, D), the base's.
        weight: W (V, D), may be packed; bias: (V,) or None; both shared.
        ids: (n,), the sampled tokens x.
        set_logits: (n, K) or None.
    """
    (n, _), device, (members, _, price) = hidden.shape, hidden.device, worth
    sets, strengths = len(members), worth.strengths.float().to(device)
    if isinstance(weight, PackedMatrix):
        policy, base = PieceLogits(hidden, bias, set_logits, members), PieceLogits(base_hidden, bias, None, members)
        return _of_packed(policy, base, weight, ids, Worth(members, strengths, price))
    others = (members.amax(0) == 0).float() if price else None
    out = PositionGradients(
        torch.empty(n, sets, device=device), torch.empty(n, device=device), torch.zeros(n, device=device),
        torch.empty_like(hidden), torch.empty_like(hidden),
        torch.empty(n, sets, device=device), torch.empty(n, sets, device=device),
    )  # fmt: skip
    step = chunk_positions(len(weight))
    for start in range(0, n, step):
        part = slice(start, start + step)
        z = F.linear(hidden[part], weight, bias).float()
        if set_logits is not None:
            z.addmm_(set_logits[part].float(), members)
        log_pi = z.log_softmax(1)
        log_p = F.linear(base_hidden[part], weight, bias).float().log_softmax(1)
        log_ratio, pi = log_pi - log_p, log_pi.exp()
        out.kl[part] = (pi * log_ratio).sum(1)
        out.mass[part] = mass = pi @ members.T
        x = ids[part]
        out.score_set[part] = members.T[x] - mass
        out.score_hidden[part] = weight[x] - pi.to(weight.dtype) @ weight
        value = (mass * strengths[part]).sum(1) - out.kl[part]
        if others is not None:
            share, base_share = ((p @ others).clamp(min=1e-30).log() for p in (pi, log_p.exp_()))
            among = (log_ratio - (share - base_share)[:, None]).mul_(others)  # what is left is among the others
            out.outside[part] = (pi * among).sum(1)
            log_ratio.add_(among, alpha=price)
            value -= price * out.outside[part]
        g = log_ratio.neg_().addmm_(strengths[part], members)
        dz = g.sub_(value[:, None]).mul_(pi)
        out.now_set[part] = dz @ members.T
        out.now_hidden[part] = dz.to(weight.dtype) @ weight
    return out


def _of_packed(
    policy: PieceLogits, base: PieceLogits, weight: PackedMatrix, ids: torch.Tensor, worth: Worth
) -> PositionGradients:
    """`position_gradients` in pieces of the vocabulary, each for all positions, so that W is unpacked twice in all.

    The first pass leaves log sum exp of both, over all tokens and over those outside of the sets, and J, whose sums are
    scaled down whenever another piece makes the policy's log sum exp grow; the second makes the logits again.
    """
    hidden, (members, strengths, price) = policy.hidden, worth
    n, sets = len(hidden), len(members)
    in_sets = members.amax(0) > 0
    total, base_total, rest, base_rest = torch.full((4, n), float("-inf"))
    value, among = torch.zeros(2, n)
    for part, w in weight.pieces(hidden.dtype):
        z, plain, inside = policy.student(part, w), base.student(part, w), in_sets[part]
        grown = torch.logaddexp(total, z.logsumexp(1))
        base_total = torch.logaddexp(base_total, plain.logsumexp(1))
        rest = torch.logaddexp(rest, z.masked_fill(inside, float("-inf")).logsumexp(1))
        base_rest = torch.logaddexp(base_rest, plain.masked_fill(inside, float("-inf")).logsumexp(1))
        shrunk, odds = (total - grown).exp(), plain.sub_(z)
        pi = z.sub_(grown[:, None]).exp_()
        among = among * shrunk - (odds.masked_fill(inside, 0.0) * pi).sum(1)
        value = value * shrunk + (odds.addmm_(strengths, members[:, part]) * pi).sum(1)
        total = grown
    shift, apart = total - base_total, rest - base_rest
    outside = among - (rest - total).exp() * apart
    value += shift - price * outside
    mass, kl, now_set = torch.zeros(n, sets), torch.zeros(n), torch.zeros(n, sets)
    now_hidden, mean_row = torch.zeros(2, n, hidden.shape[1])
    for part, w in weight.pieces(hidden.dtype):
        z, plain = policy.student(part, w), base.student(part, w)
        odds = plain.neg_().add_(z)
        pi = z.sub_(total[:, None]).exp_()
        kl += (pi * (odds - shift[:, None])).sum(1)
        mass += pi @ members[:, part].T
        mean_row += pi.to(w.dtype) @ w
        if price:
            odds += price * (odds - apart[:, None]).masked_fill_(in_sets[part], 0.0)
        dz = odds.sub_(shift[:, None]).neg_().addmm_(strengths, members[:, part]).sub_(value[:, None]).mul_(pi)
        now_set += dz @ members[:, part].T
        now_hidden += dz.to(w.dtype) @ w
    score = weight.rows(ids) - mean_row
    return PositionGradients(
        mass,
        kl,
        outside if price else torch.zeros(n),
        now_hidden.to(hidden.dtype),
        score.to(hidden.dtype),
        now_set,
        members.T[ids] - mass,
    )


def advantages(rewards: torch.Tensor, values: torch.Tensor, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what x_t does to the rewards after it, and the value's regression targets; all (N, T).

    delta_t = r_t + V(c_{t+1}) - V(c_t),   A_t = sum_l decay^l delta_{t+l},   V after the last token is 0.
    `rewards` are expectations given c_t, so r_t itself does not depend on x_t and A_t is about the future alone.
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    delta = rewards + following - values
    out = torch.empty_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + decay * running
        out[:, t] = running
    return out, out + values


class Value(nn.Module):
    """V(c_t): the expected rewards from position t to the end, from the hidden state and the time left.

    Two layers on (h, t/T), times the tokens left, plus a mean per position: (N, T, D) -> (N, T).
    """

    time: torch.Tensor

    def __init__(self, width: int, length: int, sets: int = 1, hidden: int = 128) -> None:
        super().__init__()
        first, last = nn.Linear(width + 1 + 2 * sets, hidden), nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(first, nn.GELU(), last)
        self.by_position = nn.Parameter(torch.zeros(length))
        self.register_buffer("time", torch.linspace(1, 1 / length, length), persistent=False)

    def forward(self, hidden: torch.Tensor, excess: torch.Tensor) -> torch.Tensor:
        time = self.time[None, :, None].expand(len(hidden), -1, 1)
        features = torch.cat([hidden.float(), time, excess, excess.square() / 4], dim=-1)
        return self.net(features).squeeze(-1) + self.by_position

    def fit(
        self,
        optimizer: torch.optim.Optimizer,
        hidden: torch.Tensor,
        excess: torch.Tensor,
        targets: torch.Tensor,
        epochs: int,
    ) -> float:
        """Regress on `targets` (N, T) in quarters of the batch; returns the share of variance explained before."""
        with torch.no_grad():
            explained = 1 - float((targets - self(hidden, excess)).var() / targets.var().clamp(min=1e-9))
        for _ in range(epochs):
            for rows in torch.randperm(len(hidden)).chunk(4):
                loss = F.mse_loss(self(hidden[rows], excess[rows]), targets[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        return explained
