"""The set head's tilt lambda(h) = a h + b that gives every family of texts a tilt of its own, at the least KL.

The teacher has one moment a family: among all distributions with E_f[m] = R in each family f, m the mass on the set,
the base tilted by a constant lambda_f in family f is nearest to the base (the I-projection). A head does not see
families, it sees states h. Of all heads with the mean tilt t_f in family f, where E_f[v lambda] = t_f E_f[v] and
v = dm/dlambda = m (1 - m), the one with the least KL (dKL = lambda v dlambda) is the least-squares fit, weighted by v,
of multipliers mu_f:

    (a, b) = (sum_f G_f + rho)^-1 sum_f c_f mu_f,     G_f = E_f[v x x^T],   c_f = E_f[v x],   x = (h, 1),

with mu from the linear equations c_f (a, b) = t_f E_f[v]. Where h tells the family exactly, mu_f = t_f = lambda_f. The
ridge rho, on a alone, is one under which families that are left out of the fit come near their rates (`_best_ridge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .tilt import Atoms, solve_rates, tilted_atoms

RIDGES = (1e-2, 0.1, 1.0, 10.0, 100.0)
"""In units of the mean of the diagonal of sum_f G_f."""


@dataclass(frozen=True)
class Contexts:
    """M positions of one family, of texts that the tilted model wrote.

    Attributes:
        states: h, (M, D), bf16 to save memory.
        masses: (M, P), the base's masses of the atoms there, float32.
        tilt: (M, K), the tilt that the text was sampled under.
    """

    states: torch.Tensor
    masses: torch.Tensor
    tilt: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence[Contexts]) -> Contexts:
        names = ("states", "masses", "tilt")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Price:
    """What heads cost in the same contexts, F families, K sets; KL in nats per token, means over the families.

    Attributes:
        teacher: lambda_f (F, K) with which every family holds its rate; its KL is `kl_of_teacher`.
        constant: the one lambda (K,) with the rate on average over all families; its KL is `kl_of_constant`.
        rates_of_constant: (F, K).
        kl: of the head.
    """

    teacher: torch.Tensor
    constant: torch.Tensor
    rates_of_constant: torch.Tensor
    kl: float
    kl_of_teacher: float
    kl_of_constant: float

    @property
    def ratio(self) -> float:
        """The head's KL over that of the one lambda."""
        return self.kl / self.kl_of_constant if self.kl_of_constant > 1e-9 else 1.0


class HeadFitter:
    """Heads for F families.

    Args:
        families: every family's contexts.
        atoms: of K sets.
        rates: wanted R (K,).
        intercept: whether the head has an offset b; without one it finds, among the states, what they have in common.
    """

    def __init__(self, families: Sequence[Contexts], atoms: Atoms, rates: list[float], *, intercept: bool) -> None:
        self._families, self._patterns, self._rates = families, atoms.patterns, rates
        self._intercept = intercept
        every = [family.states[:: len(families)].float() for family in families]  # a sample sets the units
        self._center = torch.cat(every).mean(0) if intercept else torch.zeros(families[0].states.shape[1])
        self._unit = float((torch.cat(every) - self._center).square().mean().sqrt().clamp(min=1e-12))
        self._grams, means, weights = zip(*map(self._moments, families), strict=True)
        self._means, self._weights = torch.stack(means), torch.stack(weights)
        self.ridge: float | None = None

    def _moments(self, family: Contexts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(G_f (K, D', D') float32, of which there are F, c_f (K, D'), E_f[v] (K,))."""
        x, grams, means = self._inputs(family), [], []
        m = self._tilted(family, family.tilt) @ self._patterns
        v = torch.where(torch.tensor(self._rates) > 0, m * (1 - m), 1.0).float() / len(m)  # 0 needs its tilt everywhere
        for weight in v.T:
            vx = weight[:, None] * x
            grams.append(vx.T @ x)
            means.append(vx.sum(0).double())
        return torch.stack(grams), torch.stack(means), v.double().sum(0)

    def _inputs(self, family: Contexts) -> torch.Tensor:
        """x = ((h - center) / unit, 1), or h / unit; (M, D')."""
        x = (family.states.float() - self._center) / self._unit
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if self._intercept else x

    def _tilted(self, family: Contexts, tilt: torch.Tensor) -> torch.Tensor:
        """Masses of the atoms under a tilt (M, K) or (K,), (M, P) float64."""
        return (family.masses.double().log() + tilt.double() @ self._patterns.T).softmax(1)

    def head(self, tilts: torch.Tensor, ridge: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """a (K, D) and b (K,) of the head with mean tilts (F, K) in the families."""
        ridge = self._best_ridge(tilts) if ridge is None else ridge
        return self._unscaled(self._coefficients(tilts, list(range(len(self._families))), ridge))

    def _coefficients(self, tilts: torch.Tensor, chosen: list[int], ridge: float) -> torch.Tensor:
        """x's coefficients (K, D')."""
        size, found = len(self._center), []
        for k in range(tilts.shape[1]):
            means = self._means[chosen, k].T  # (D', F)
            gram = torch.zeros(len(means), len(means), dtype=torch.float64)
            for family in chosen:
                gram += self._grams[family][k]
            gram.diagonal()[:size] += ridge * gram.diagonal()[:size].mean()
            maps = torch.linalg.solve(gram, means)
            wanted = (self._weights[chosen, k] * tilts[chosen, k].double())[:, None]
            found.append((maps @ torch.linalg.lstsq(means.T @ maps, wanted).solution)[:, 0])
        return torch.stack(found)

    def _unscaled(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b on the states themselves."""
        size = len(self._center)
        direction = coefficients[:, :size] / self._unit
        if not self._intercept:
            return direction.float(), torch.zeros(len(direction))
        return direction.float(), (coefficients[:, size] - direction @ self._center.double()).float()

    def _best_ridge(self, tilts: torch.Tensor) -> float:
        """Chosen once: the smallest that is no worse than the best by more than the best one's standard error."""
        if self.ridge is None and len(self._families) > 2:
            squares = [self.left_out(tilts, ridge).square().flatten() for ridge in RIDGES]
            best = min(squares, key=lambda errors: float(errors.mean()))
            most = best.mean() + best.std() / len(best) ** 0.5
            self.ridge = next(r for r, errors in zip(RIDGES, squares, strict=True) if errors.mean() <= most)
        return RIDGES[0] if self.ridge is None else self.ridge

    def left_out(self, tilts: torch.Tensor, ridge: float) -> torch.Tensor:
        """Log-odds by which each family misses its rate in its contexts, fitted to the others, (F, K)."""
        everyone, found = list(range(len(self._families))), []
        for f in everyone:
            head = self._unscaled(self._coefficients(tilts, [g for g in everyone if g != f], ridge))
            found.append(self.rates(self._families[f], *head))
        wanted = torch.tensor(self._rates, dtype=torch.float64)
        return torch.where(wanted > 0, torch.logit(torch.stack(found)) - torch.logit(wanted), 0.0)

    def rates(self, family: Contexts, direction: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Expected rates (K,) of a head in a family's contexts."""
        tilt = family.states.float() @ direction.T + offset
        return (self._tilted(family, tilt) @ self._patterns).mean(0)

    def price(self) -> Price:
        """What the three cost that hold their rates in these very contexts: a head, the teacher, one constant."""
        masses = [family.masses.double() for family in self._families]
        teacher = [solve_rates(m, self._patterns, self._rates) for m in masses]
        size = min(map(len, masses))  # every family counts the same
        constant = solve_rates(torch.cat([m[:size] for m in masses]), self._patterns, self._rates)
        plain = [tilted_atoms(m, self._patterns, constant) @ self._patterns for m in masses]
        direction, offset = self.head(self._exact(torch.stack(teacher)))
        tilts = [family.states.float() @ direction.T + offset for family in self._families]
        return Price(
            torch.stack(teacher), constant, torch.stack([m.mean(0) for m in plain]),
            self._mean_kl(tilts), self._mean_kl(teacher), self._mean_kl([constant] * len(masses)),
        )  # fmt: skip

    def _exact(self, tilts: torch.Tensor) -> torch.Tensor:
        """Mean tilts (F, K) near `tilts` under which a head holds every rate in these contexts."""
        wanted = torch.tensor(self._rates, dtype=torch.float64)
        for _ in range(30):
            head = self.head(tilts)
            found = torch.stack([self.rates(family, *head) for family in self._families])
            missed = torch.where(wanted > 0, torch.logit(wanted) - torch.logit(found), 0.0)
            if missed.abs().max() < 1e-3:
                break
            tilts = tilts + missed.clamp(-1, 1)
        return tilts

    def _mean_kl(self, tilts: Sequence[torch.Tensor]) -> float:
        """KL(q || p) per token under a tilt for every family, mean over the families."""
        total = 0.0
        for family, tilt in zip(self._families, tilts, strict=True):
            q = self._tilted(family, tilt)
            total += float(torch.special.xlogy(q, q / family.masses.double()).sum(1).mean())
        return total / len(self._families)
