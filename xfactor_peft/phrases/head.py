"""The phrase head: an output term of low rank on the tokens that begin, carry on or end a pattern.

    logits_i += B_i . (A h) + b_i   for i in T,          A (r, D), B (|T|, r), b (|T|)

It is LoRA on the output embedding whose lora_B has no row outside of T. b_i alone is a logit bias; A h makes it depend
on the context, which is what "heart" needs after "in the". All other tokens keep their odds to each other exactly.

The trunk is the base's, so its states are drawn once and the rest is a regression on them. With p the base, teacher
q_i ~ p_i w_i and student pi_i ~ p_i e^(u_i), both on T alone,

    KL(q || pi) = sum_T q_i (log w_i - u_i) + log Z_pi - log Z_q,      Z_q = 1 - p(T) + sum_T p_i w_i,  Z_pi likewise:

|T| numbers a position instead of V.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..base.split_model import SplitModel
from ..lowmem.gguf_layers import PackedMatrix
from ..objective.kl import StateTeacher, tilted_kl_loss
from ..progress import report
from .along import weights_along
from .ban import BAN
from .texts import Texts
from .values import Values

TOKENS = 1536
"""Most tokens of T; those that matter most are taken."""
EFFECT = 0.05
"""Least |log w| that is looked at."""


@dataclass(frozen=True)
class Positions:
    """Where the head learns: n positions, those of texts in a row.

    Attributes:
        hidden: the texts' states as they are, (N L, D) each, not copied; place: (n,), which of their rows.
        log_z: (n,); table: (S, |T|), log w by state; state: (n,), rows of the table.
        came, own: (n,), of the token that came: its column of the table, and its log w, this context's own in place of
            the table's; column -1 where it has none.
        weight: (n,), how much more often the teacher would be there than what the text was drawn from.
    """

    hidden: tuple[torch.Tensor, ...]
    place: torch.Tensor
    log_z: torch.Tensor
    table: torch.Tensor
    state: torch.Tensor
    came: torch.Tensor
    own: torch.Tensor
    weight: torch.Tensor

    def states(self, rows: torch.Tensor) -> torch.Tensor:
        """The base's states at some positions, (m, D) float32."""
        place, first = self.place[rows], 0
        found = torch.empty(len(rows), self.hidden[0].shape[1])
        for part in self.hidden:
            here = (place >= first) & (place < first + len(part))
            found[here] = part[place[here] - first].float()
            first += len(part)
        return found

    def log_weights(self, rows: torch.Tensor) -> torch.Tensor:
        """log w at some positions, (m, |T|)."""
        table, came = self.table[self.state[rows]], self.came[rows]
        known = (came >= 0).nonzero().squeeze(1)
        table[known, came[known]] = self.own[rows[known]]
        return table

    def batches(self, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        yield from torch.randperm(len(self.state), generator=generator).split(size)


class PhraseHead(nn.Module):
    """u (n, |T|) of states (n, D).

    Args:
        tokens: T, sorted; weight: W (V, D), bias: (V,) or None, of the base's output embedding; rank: r, 0 for b alone.
    """

    def __init__(
        self, tokens: np.ndarray, weight: torch.Tensor | PackedMatrix, bias: torch.Tensor | None, rank: int
    ) -> None:
        super().__init__()
        self.tokens = torch.from_numpy(tokens)
        rows = weight.rows(self.tokens) if isinstance(weight, PackedMatrix) else weight[self.tokens]
        self.base_weight = rows.detach().float().cpu()  # as the states of texts are, wherever the model is
        self.base_bias = None if bias is None else bias[self.tokens].detach().float().cpu()
        self.banned = torch.zeros(0, dtype=torch.long)
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(len(tokens), rank))
        self.offset = nn.Parameter(torch.zeros(len(tokens)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden @ self.a.T) @ self.b.T + self.offset

    def p(self, hidden: torch.Tensor, log_z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's probabilities (n, |T|) and of all else (n, 1): both positive, whatever log_z was rounded to."""
        p = (F.linear(hidden, self.base_weight, self.base_bias) - log_z[:, None]).exp()
        rest = (1 - p.sum(1, keepdim=True)).clamp(min=1e-6)
        total = p.sum(1, keepdim=True) + rest
        return p / total, rest / total

    def kl(self, at: Positions, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL(q || student), KL(q || base)) at each of these positions."""
        hidden, log_w = at.states(rows), at.log_weights(rows)
        (p, rest), u = self.p(hidden, at.log_z[rows]), self(hidden)
        w = log_w.exp()
        z_q, z_pi = rest[:, 0] + (p * w).sum(1), rest[:, 0] + (p * u.exp()).sum(1)
        q = p * w / z_q[:, None]
        to_base = (q * log_w).sum(1) - z_q.log()
        return to_base - (q * u).sum(1) + z_pi.log(), to_base

    def state_loss(self, policy: SplitModel, hidden: torch.Tensor, at: Positions, rows: torch.Tensor) -> torch.Tensor:
        """Mean KL(q || student) at these positions over the whole vocabulary, for a trunk that changes: its states are
        `hidden` (n, D). The gradient reaches them and b."""
        size, bias, device = policy.weight.shape[0], policy.bias, hidden.device
        own = torch.zeros(size) if bias is None else bias.detach().float().cpu()
        own = own.index_add(0, self.tokens, self.offset).to(hidden)
        log_w = at.log_weights(rows).to(device)
        teacher = StateTeacher(at.states(rows).to(hidden), bias, self.tokens.to(device), log_w)
        b = torch.zeros(max(1, len(self.a)), size).index_copy_(1, self.tokens, self.b.detach().T).to(device)
        term = hidden.float() @ self.a.detach().T.to(device) if len(self.a) else None
        return tilted_kl_loss(hidden, policy.weight, teacher, b, bias=own, set_logits=term).loss

    @torch.no_grad()
    def follow(self, before: Values, after: Values) -> None:
        """b by what log w changes for tokens that begin something, when the strengths do."""
        tokens = self.tokens.numpy()
        start = after.automaton.start
        change = after.log_weights(start, tokens) - before.log_weights(start, tokens)
        self.offset.add_(torch.from_numpy(change))

    @torch.no_grad()
    def add_to(self, z: torch.Tensor, hidden: torch.Tensor, states: np.ndarray) -> None:
        """u in place: texts drawn from the student (a `texts.Tilt`)."""
        z.index_add_(1, self.tokens.to(z.device), self(hidden.float().cpu()).to(z))
        z[:, self.banned.to(z.device)] += BAN

    def ban(self, ids: np.ndarray) -> None:
        """These tokens never, whatever was learnt."""
        self.banned = torch.from_numpy(ids)

    @torch.no_grad()
    def start(self, at: Positions) -> None:
        """b at the best logit bias for small masses: log of the mean of p w over the mean of p."""
        wanted, given = torch.zeros(len(self.tokens)), torch.zeros(len(self.tokens))
        for rows in torch.arange(len(at.state)).split(4096):
            p = self.p(at.states(rows), at.log_z[rows])[0] * at.weight[rows, None]
            wanted += (p * at.log_weights(rows).exp()).sum(0)
            given += p.sum(0)
        self.offset.copy_((wanted.clamp(min=1e-30) / given.clamp(min=1e-30)).log().clamp(-20, 20))


def chosen_tokens(values: Values) -> np.ndarray:
    """T: the tokens whose weight is not 1 from some visited state, those that change most first kept."""
    stats, effect = values.statistics, np.zeros(values.automaton.vocab_size)
    for state, seen in stats.visits.items():
        row, (w, _) = values.automaton.row(state), values.row(state)
        size = np.abs(np.log(np.maximum(w, 1e-9)))
        share = seen.masses / max(seen.count, 1.0)
        # what a token does here, and a little for what it would do where nobody was
        np.add.at(effect, row.ids, np.where(size > EFFECT, size * (seen.count * share + 1e-3 * (size > 0.5)), 0.0))
    found = np.flatnonzero(effect > 1e-5 * max(effect.max(), 1e-30))
    return np.sort(found[np.argsort(-effect[found])][:TOKENS])


def positions(head: PhraseHead, policy: SplitModel, texts: Texts, values: Values) -> tuple[Positions, torch.Tensor]:
    """The texts' positions but those that wait for a word's end, which every continuation is about; and which they are,
    (N, L) bool."""
    tokens = head.tokens.numpy()
    states, places = np.unique(texts.states, return_inverse=True)
    table = torch.from_numpy(np.stack([values.log_weights(int(s), tokens) for s in states]))
    inverse = torch.from_numpy(places).view(texts.ids.shape)
    own = torch.from_numpy(weights_along(policy, texts, values))
    columns = torch.full((values.automaton.vocab_size,), -1)
    columns[head.tokens] = torch.arange(len(head.tokens))
    came = torch.where(own != 0, columns[texts.ids], -1)
    weight = torch.from_numpy(_weights(texts, values)).float()
    waits = np.array([bool(values.automaton.row(int(s)).waiting) for s in states])
    keep = torch.from_numpy(~waits)[inverse]
    parts = (part[keep] for part in (inverse, came, own, weight))
    place = keep.flatten().nonzero().squeeze(1)
    return Positions((texts.hidden.flatten(0, 1),), place, texts.log_z[keep], table, *parts), keep


def joined(parts: list[Positions]) -> Positions:
    """All of them."""
    firsts = np.cumsum([0, *(len(p.hidden[0]) for p in parts[:-1])]).tolist()
    rows = np.cumsum([0, *(len(p.table) for p in parts[:-1])]).tolist()
    return Positions(
        tuple(p.hidden[0] for p in parts),
        torch.cat([p.place + first for p, first in zip(parts, firsts, strict=True)]),
        torch.cat([p.log_z for p in parts]),
        torch.cat([p.table for p in parts]),
        torch.cat([p.state + first for p, first in zip(parts, rows, strict=True)]),
        torch.cat([p.came for p in parts]),
        torch.cat([p.own for p in parts]),
        torch.cat([p.weight for p in parts]),
    )


def _weights(texts: Texts, values: Values) -> np.ndarray:
    """How much more often than the base the teacher goes the way of an occurrence under way, (N, L).

    Along an occurrence the ratios of p w telescope to g of where it has got to.
    """
    out = np.ones(texts.states.shape)
    inside = np.array([values.automaton.automaton.inside(s) for s in range(len(values.automaton.automaton))])
    under_way = inside[texts.states]
    out[under_way] = values.worth(texts.states[under_way])
    return np.clip(out, 0.0, 10.0)


def fit(
    head: PhraseHead,
    at: Positions,
    *,
    epochs: int,
    lr: float = 3e-3,
    size: int = 1024,
    seed: int = 0,
) -> list[float]:
    """Adam on the weighted mean of KL(q || student); the loss of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    steps = max(1, epochs * -(-len(at.state) // size))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(epochs):
        report(0, epochs)  # it is still there; what takes long comes after it
        total = 0.0
        for rows in at.batches(size, generator):
            loss = (head.kl(at, rows)[0] * at.weight[rows]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / len(at.state))
    return losses


@torch.no_grad()
def mean_kl(head: PhraseHead, at: Positions) -> tuple[float, float]:
    """Weighted means of (KL(q || student), KL(q || base)) a position."""
    parts = [torch.stack(head.kl(at, rows)) * at.weight[rows] for rows in torch.arange(len(at.state)).split(2048)]
    first, second = torch.cat(parts, dim=1).double().mean(1).tolist()
    return first, second
