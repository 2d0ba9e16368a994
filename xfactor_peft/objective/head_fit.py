"""Fits the set head's tilt lambda(h) = a h + b so that every family of texts holds its rate, at the least KL.

The teacher has one moment a family: among all distributions with E_f[m] = R in each family f, m the mass on the set, the
base tilted by a constant lambda_f in family f is nearest to the base (the I-projection). A head does not see families, it
sees states h. Of all heads that give every family its rate the one with the least KL is, setting the derivative of

    sum_f E_f[KL(q || p)] + sum_f mu_f (R - E_f[m]),      dKL = lambda dm,   dm = v dlambda,   v = m (1 - m)

to zero, the least-squares fit of mu_f from (h, 1), weighted by v:

    (a, b) = (sum_f E_f[v x x^T] + rho)^-1 sum_f E_f[v x] mu_f,      x = (h, 1),

in which mu is found by Newton's method so that E_f[m] = R in every family. Where h tells the family exactly, mu_f is
lambda_f. The ridge rho, on a alone, is the one under which families that were left out of the fit hold their rate best.

Expectations are over texts that were sampled under another tilt near by; how a text weighs under a head is known exactly
from the masses along it, as in `sampling.reweighting`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

RIDGES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
"""In units of the mean eigenvalue of the states' weighted second moment."""
ROUNDS, EXACT, STEP = 12, 1e-4, 2.0


@dataclass(frozen=True)
class FamilyTexts:
    """N texts of L tokens of one family, sampled under a known tilt.

    Attributes:
        states: h, (N, L, D), bf16 to save memory.
        log_atoms: log masses of the P atoms under the base, (N, L, P) float32.
        drawn: (N, L) long, the atom of every token.
        tilt: (N, L, K), the tilt that they were sampled under.
    """

    states: torch.Tensor
    log_atoms: torch.Tensor
    drawn: torch.Tensor
    tilt: torch.Tensor


@dataclass(frozen=True)
class HeadFit:
    """A fitted head, and what was found on the way; F families, K sets.

    Attributes:
        direction, offset: a (K, D) and b (K,).
        teacher: lambda_f, (F, K).
        constant: the one lambda (K,) with that rate on average over the families.
        rates: (F, K), expected under the head.
        rates_of_constant: (F, K), expected under the one lambda.
        kl, kl_of_teacher, kl_of_constant: mean KL from the base in nats per token of head, teacher and one lambda.
        left_out: (F, K), log-odds by which a family misses its rate that was left out of the fit; empty for one family.
        ridge: rho.
    """

    direction: torch.Tensor
    offset: torch.Tensor
    teacher: torch.Tensor
    constant: torch.Tensor
    rates: torch.Tensor
    rates_of_constant: torch.Tensor
    kl: float
    kl_of_teacher: float
    kl_of_constant: float
    left_out: torch.Tensor
    ridge: float


class _Family:
    """One family's texts and the expectations over them under any tilt (N, L, K)."""

    def __init__(self, texts: Sequence[FamilyTexts], patterns: torch.Tensor) -> None:
        self._parts, self._patterns = texts, patterns.float()
        self._proposals = [self._log_weights(part, part.tilt) for part in texts]

    def _log_weights(self, part: FamilyTexts, tilt: torch.Tensor) -> torch.Tensor:
        """log q / p of the tokens before every position, (N, L)."""
        raised = tilt @ self._patterns.T
        steps = raised.gather(-1, part.drawn[..., None])[..., 0] - (part.log_atoms + raised).logsumexp(-1)
        steps = steps.double()
        return steps.cumsum(1) - steps

    def expect(self, tilts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Under a tilt (N, L, K) for each part: weights (M,) that add up to 1, masses (M, K) and KL (M,), M = all N L.

        Parts count by their effective number of texts at the end.
        """
        weights, sizes, masses, kl = [], [], [], []
        for part, proposal, tilt in zip(self._parts, self._proposals, tilts, strict=True):
            w = (self._log_weights(part, tilt) - proposal).softmax(0)
            sizes.append(1 / w[:, -1].square().sum())
            weights.append(w / w.shape[1])
            raised = tilt @ self._patterns.T
            total = (part.log_atoms + raised).logsumexp(-1, keepdim=True)
            q = (part.log_atoms + raised - total).exp()
            masses.append((q @ self._patterns).flatten(0, 1))
            kl.append((q * (raised - total)).sum(-1).flatten())  # masses of the base's atoms add up to 1
        total_size = torch.stack(sizes).sum()
        flat = torch.cat([(w * size / total_size).flatten() for w, size in zip(weights, sizes, strict=True)])
        return flat.float(), torch.cat(masses), torch.cat(kl)

    def rates(self, tilts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, float]:
        """(expected rates (K,), KL) under the tilts."""
        weights, masses, kl = self.expect(tilts)
        return weights @ masses, float(weights @ kl)

    def constant(self, tilt: torch.Tensor) -> list[torch.Tensor]:
        """The same tilt (K,) everywhere."""
        return [tilt.expand(*part.drawn.shape, -1) for part in self._parts]

    def of_head(self, direction: torch.Tensor, offset: torch.Tensor) -> list[torch.Tensor]:
        """a h + b at every position."""
        return [part.states.float() @ direction.T + offset for part in self._parts]

    def rows(self) -> torch.Tensor:
        """All states, (M, D) float32."""
        return torch.cat([part.states.flatten(0, 1) for part in self._parts]).float()

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """(M, ...) values, a tensor (N, L, ...) for each part."""
        sizes = [part.drawn.numel() for part in self._parts]
        parts = zip(self._parts, values.split(sizes), strict=True)
        return [value.view(*part.drawn.shape, *values.shape[1:]) for part, value in parts]


def _log_odds(rates: torch.Tensor) -> torch.Tensor:
    return torch.logit(rates.clamp(1e-7, 1 - 1e-7))


def _solved(measure: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The constant tilt (K,) with these rates: fixed-point steps in log-odds, which are nearly a line in it."""
    tilt = start.clone()
    for _ in range(40):
        error = _log_odds(wanted) - _log_odds(measure(tilt))
        if error.abs().max() < EXACT:
            break
        tilt = tilt + 0.8 * error.clamp(-STEP, STEP)
    return tilt


class HeadFitter:
    """Samples of F families, and heads that give each its rates.

    Args:
        families: for every family its texts, of one round of sampling or of several.
        patterns: (P, K), which sets an atom belongs to.
        rates: R (K,), above 0.
        intercept: whether the head has an offset b; without one it needs a direction in which all states are alike.
    """

    def __init__(
        self, families: Sequence[Sequence[FamilyTexts]], patterns: torch.Tensor, rates: torch.Tensor, *, intercept: bool
    ) -> None:
        self._families = [_Family(texts, patterns) for texts in families]
        self._wanted, self._intercept = rates.float(), intercept
        self._teachers = [
            _solved(lambda t, f=family: f.rates(f.constant(t))[0], texts[0].tilt.flatten(0, 1).mean(0), self._wanted)
            for family, texts in zip(self._families, families, strict=True)
        ]
        self._moments()

    def _moments(self) -> None:
        """E_f[v x x^T] (D', D') and E_f[v x] (D',) of every family and set at the teacher, x centred where b is free."""
        rows = torch.cat([family.rows()[:: max(1, len(self._families))] for family in self._families])
        self._center = rows.mean(0) if self._intercept else torch.zeros(rows.shape[1])
        self._unit = float((rows - self._center).square().mean().sqrt())
        self._grams, self._means = [], []
        for family, teacher in zip(self._families, self._teachers, strict=True):
            weights, masses, _ = family.expect(family.constant(teacher))
            x, grams, means = self._inputs(family), [], []
            for m in masses.T:
                vx = (weights * m * (1 - m))[:, None] * x
                grams.append(vx.T @ x)
                means.append(vx.sum(0))
            self._grams.append(torch.stack(grams))
            self._means.append(torch.stack(means))

    def _inputs(self, family: _Family) -> torch.Tensor:
        """x = ((h - center) / unit, 1), or h / unit; (M, D')."""
        x = (family.rows() - self._center) / self._unit
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if self._intercept else x

    def _maps(self, chosen: Sequence[int], ridge: float) -> torch.Tensor:
        """The matrices that make (a, b) of mu, (K, D', F)."""
        maps = []
        for k in range(len(self._wanted)):
            gram = torch.stack([self._grams[f][k] for f in chosen]).mean(0).double()
            size = len(self._center)
            gram.diagonal()[:size] += ridge * gram.diagonal()[:size].mean()
            means = torch.stack([self._means[f][k] for f in chosen], dim=1).double() / len(chosen)
            maps.append(torch.linalg.solve(gram, means).float())
        return torch.stack(maps)

    def _solve(self, chosen: Sequence[int], ridge: float) -> torch.Tensor:
        """x's coefficients (K, D') under which the chosen families hold their rates."""
        maps = self._maps(chosen, ridge)
        seen = [(self._inputs(self._families[f]) @ maps).permute(1, 0, 2) for f in chosen]  # (M, K, F) each
        mu = torch.stack([self._teachers[f] for f in chosen], dim=1)  # (K, F)
        for _ in range(ROUNDS):
            found = [self._families[f].expect(self._families[f].split((s * mu).sum(-1)))
                     for f, s in zip(chosen, seen, strict=True)]  # fmt: skip
            error = torch.stack([self._wanted - w @ m for w, m, _ in found], dim=1)  # (K, F)
            if error.abs().max() < EXACT * self._wanted.min():
                break
            slopes = torch.stack(
                [torch.einsum("i,ik,ikg->kg", w, m * (1 - m), s) for (w, m, _), s in zip(found, seen, strict=True)],
                dim=1,
            )  # d E_f[m_k] / d mu_kg, (K, F, F)
            step = torch.linalg.lstsq(slopes.double(), error[..., None].double()).solution[..., 0].float()
            felt = max(float((s * step).sum(-1).abs().mean()) for s in seen)
            mu = mu + step * min(1.0, 1.0 / max(felt, 1e-9))
        return (maps * mu[:, None]).sum(-1)

    def _head(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a (K, D) and b (K,) on the states themselves."""
        size = len(self._center)
        direction = coefficients[:, :size] / self._unit
        offset = -direction @ self._center
        return direction, offset + coefficients[:, size] if self._intercept else torch.zeros_like(offset)

    def left_out(self, ridge: float) -> torch.Tensor:
        """Log-odds by which each family misses its rate under a head that is fitted to the others, (F, K)."""
        everyone, errors = range(len(self._families)), []
        for f in everyone:
            head = self._head(self._solve([g for g in everyone if g != f], ridge))
            rates, _ = self._families[f].rates(self._families[f].of_head(*head))
            errors.append(_log_odds(rates) - _log_odds(self._wanted))
        return torch.stack(errors)

    def fit(self, ridge: float | None = None) -> HeadFit:
        """The head for all families; without a `ridge` of one's own, the best of `RIDGES` for families left out."""
        count = len(self._families)
        tried = {}
        if ridge is None and count > 2:
            tried = {value: self.left_out(value) for value in RIDGES}
            ridge = min(tried, key=lambda value: float(tried[value].square().mean()))
        ridge = RIDGES[0] if ridge is None else ridge
        direction, offset = self._head(self._solve(range(count), ridge))
        found = [family.rates(family.of_head(direction, offset)) for family in self._families]
        taught = [f.rates(f.constant(t)) for f, t in zip(self._families, self._teachers, strict=True)]
        one = _solved(self._mean_rates, torch.stack(self._teachers).mean(0), self._wanted)
        plain = [family.rates(family.constant(one)) for family in self._families]
        return HeadFit(
            direction, offset, torch.stack(self._teachers), one,
            rates=torch.stack([rates for rates, _ in found]),
            rates_of_constant=torch.stack([rates for rates, _ in plain]),
            kl=sum(kl for _, kl in found) / count,
            kl_of_teacher=sum(kl for _, kl in taught) / count,
            kl_of_constant=sum(kl for _, kl in plain) / count,
            left_out=tried.get(ridge, torch.empty(0)),
            ridge=ridge,
        )  # fmt: skip

    def _mean_rates(self, tilt: torch.Tensor) -> torch.Tensor:
        return torch.stack([family.rates(family.constant(tilt))[0] for family in self._families]).mean(0)
