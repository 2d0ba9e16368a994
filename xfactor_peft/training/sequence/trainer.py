"""The sequence-level phase: on-policy batches, exact immediate terms, learnt values, and a strength that holds R.

Left to itself the optimum of E[count] under a KL price is a mixture: most texts untouched and a few that hold nothing
but the set ("XXXX..."), since a repeated token costs little once it has begun. That meets a mean rate and is of no use.
So every text is asked to hold about its share: with D_t the excess of set tokens over R t before position t, the
strength is

    lambda_t = lambda - mu D_t,      mu = SPREAD / (R (1-R) T),

the increments of a Gaussian log-prior on the text's count, of variance R (1-R) T / SPREAD around R T.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...base.split_model import SplitModel
from ...budget.phases import SEQUENCES
from ...lora.set_head import SetHead
from ...objective.objectives import AdapterOff, base_hidden
from ...objective.sequence_level import PositionGradients, Value, Worth, advantages, position_gradients
from ...sampling.calibration import RateController

SPREAD = 1.0
ROWS = 32
"""Sequences whose states are alive at once; gradients add up over a batch."""


@dataclass(frozen=True)
class SequenceOptions:
    """Settings of the sequence-level phase; the defaults are those of the figures.

    `outside_price` is the run's own (see `ObjectiveOptions`).
    """

    sequences: int = SEQUENCES
    lr: float = 1e-3
    decay: float = 0.9
    warm_up: int = 2
    spread: float = SPREAD
    outside_price: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class SequenceStep:
    """One batch: expected rate (first set), KL per token, lambda, gradient norm, and how it was made.

    `spread` is the standard deviation of the expected rate between texts, `explained` the share of the variance of the
    rewards to come that the learnt value explained.
    """

    step: int
    rate: float
    kl: float
    strength: float
    grad_norm: float
    explained: float
    spread: float
    seconds: float


@dataclass
class _Rows:
    """A part of a batch: states with their graph, and what one pass over the logits made of them."""

    hidden: torch.Tensor
    set_logits: torch.Tensor | None
    gradients: PositionGradients


@dataclass
class SequenceTrainer:
    """Improves a tilted policy in place.

    Attributes:
        rates: R, wanted rates (K,), float32.
        strengths: lambda (K,) at the start.
        value: the learnt value; its states are the policy's, without gradient.
        controller: moves lambda.
        optimizer, value_optimizer: of the policy and of the value.
    """

    split_model: SplitModel
    head: SetHead | None
    members: torch.Tensor
    adapter_off: AdapterOff
    rates: torch.Tensor
    strengths: torch.Tensor
    length: int
    options: SequenceOptions = field(default_factory=SequenceOptions)

    def __post_init__(self) -> None:
        device = self.split_model.weight.device
        self._parameters = [p for p in self.split_model.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": self._parameters, "lr": self.options.lr}]
        if self.head is not None:
            groups.append({"params": [self.head.offset], "lr": 20 * self.options.lr})
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._rates: list[float] = [group["lr"] for group in groups]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            self.value = Value(self.split_model.weight.shape[1], self.length, len(self.members)).to(device)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=2e-3)
        self._variance = (self.rates * (1 - self.rates) * self.length).clamp(min=1e-6)
        self.controller = RateController(self.rates, self.strengths)

    def update(self, texts: torch.Tensor, step: int, steps: int) -> SequenceStep:
        """Update number `step` of `steps` from sequences (N, P + T) of the policy as it is."""
        started = time.perf_counter()
        self._set_learning_rate(step / steps)
        rate, kl, norm, explained, spread = self._update(texts, step < self.options.warm_up)
        seconds = time.perf_counter() - started
        return SequenceStep(step, rate, kl, float(self.controller.strengths[0]), norm, explained, spread, seconds)

    @torch.no_grad()
    def price(self, ids: torch.Tensor, strengths: torch.Tensor) -> tuple[float, float]:
        """(KL, w KL_out), means per token on sequences (N, P + T) of the policy.

        The KL is moved to the wanted rates R along dKL/dR = lambda: KL - lambda (m - R), with m the set masses;
        `strengths` is lambda (K,).
        """
        moved, outside = [], []
        for rows in ids.to(self.split_model.weight.device).split(ROWS):
            gradients = self._pass(rows, strengths.expand(len(rows), self.length, -1)).gradients
            moved.append(gradients.kl - (gradients.mass - self.rates) @ strengths)
            outside.append(self.options.outside_price * gradients.outside)
        return float(torch.cat(moved).mean()), float(torch.cat(outside).mean())

    def _set_learning_rate(self, progress: float) -> None:
        """Constant for half of the run, then linear down to a tenth."""
        factor = min(1.0, 0.1 + 1.8 * (1 - progress))
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate

    def _update(self, ids: torch.Tensor, warm_up: bool) -> tuple[float, float, float, float, float]:
        ids = ids.to(self.split_model.weight.device)
        excess = self.excess(ids[:, -self.length :])
        strengths = self.controller.strengths - self.options.spread / self._variance * excess
        parts = [self._pass(rows, s) for rows, s in zip(ids.split(ROWS), strengths.split(ROWS), strict=True)]
        mass = torch.cat([part.gradients.mass for part in parts]).view(*excess.shape)
        kl = torch.cat([part.gradients.kl for part in parts]).view(mass.shape[:2])
        # The last term is the part of the prior's increment that does not depend on the token.
        prior = (self.options.spread / self._variance * self.rates * excess).sum(-1)
        outside = torch.cat([part.gradients.outside for part in parts]).view(kl.shape)
        rewards = (mass * strengths).sum(-1) + prior - kl - self.options.outside_price * outside
        states = torch.cat([part.hidden.detach() for part in parts])
        scaled = excess / self._variance.sqrt()
        with torch.no_grad():
            values = self.value(states, scaled)
        advantage, _ = advantages(rewards, values, self.options.decay)
        _, targets = advantages(rewards, values, 1.0 if warm_up else 0.95)
        explained = self.value.fit(self.value_optimizer, states, scaled, targets, 8 if warm_up else 2)
        norm = 0.0 if warm_up else self._step(parts, advantage)
        measured = mass.mean((0, 1))
        if not warm_up:
            self.controller.update(measured)
            if self.head is not None:
                self.head.shift(0.25 * self.controller.error)  # the offset follows a little at once
        spread = float(mass[..., 0].mean(1).std()) if len(mass) > 1 else 0.0
        return float(measured[0]), float(kl.mean()), norm, explained, spread

    def excess(self, continuations: torch.Tensor) -> torch.Tensor:
        """D_t, set tokens before position t beyond R t; (N, T) ids -> (N, T, K)."""
        surplus = self.members.T[continuations] - self.rates
        return torch.cat([torch.zeros_like(surplus[:, :1]), surplus.cumsum(1)[:, :-1]], dim=1)

    def _pass(self, ids: torch.Tensor, strengths: torch.Tensor) -> _Rows:
        hidden = self.split_model.hidden(ids)[:, -self.length - 1 : -1]
        logits = self.head(hidden) if self.head is not None else None
        with torch.no_grad():
            plain = base_hidden(self.split_model, ids, self.adapter_off).view(*ids.shape, -1)
        gradients = position_gradients(
            hidden.detach().flatten(0, 1),
            plain[:, -self.length - 1 : -1].flatten(0, 1),
            self.split_model.weight,
            ids[:, -self.length :].flatten(),
            bias=self.split_model.bias,
            set_logits=None if logits is None else logits.detach().flatten(0, 1),
            worth=Worth(self.members, strengths.flatten(0, 1), self.options.outside_price),
        )
        return _Rows(hidden, logits, gradients)

    def _step(self, parts: list[_Rows], advantage: torch.Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        total = advantage.numel()
        for part, scores in zip(parts, advantage.split(ROWS), strict=True):
            g, a = part.gradients, scores.flatten()[:, None]
            ascent = [g.now_hidden + a.to(g.score_hidden.dtype) * g.score_hidden]
            outputs = [part.hidden]
            if part.set_logits is not None:
                outputs.append(part.set_logits)
                ascent.append(g.now_set + a * g.score_set)
            torch.autograd.backward(
                outputs, [(-up / total).view_as(out) for up, out in zip(ascent, outputs, strict=True)]
            )
        norm = nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self.optimizer.step()
        if self.head is not None:
            self.head.write()
        return float(norm)
