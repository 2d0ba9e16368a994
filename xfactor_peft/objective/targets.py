"""What the model should say: target distributions over the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import XFactorError
from ..options import LoraOptions, ObjectiveOptions, RateOptions, TrainOptions
from ..tokens.token_set import TokenSet
from .tilt import MAX_STRENGTH


@dataclass(frozen=True)
class UniformTarget:
    """The two-level target: P(i) = alpha/Z for i in S, beta/Z for the others, Z = alpha |S| + beta (V - |S|).

    With beta = 0 it is uniform over S and zero elsewhere, whose optimum repeats S and nothing else.

    Raises:
        XFactorError: unless alpha > beta >= 0 and both are finite.
    """

    tokens: TokenSet
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        finite = math.isfinite(self.alpha) and math.isfinite(self.beta)
        if not (finite and self.alpha > self.beta >= 0):
            raise XFactorError(
                f"`alpha` must be greater than `beta`, and `beta` at least 0; got {self.alpha:g} and {self.beta:g}"
            )

    @property
    def levels(self) -> tuple[float, float]:
        """(P(i) for i in S, P(i) for i not in S)."""
        size, others = len(self.tokens), self.tokens.vocab_size - len(self.tokens)
        total = self.alpha * size + self.beta * others
        return self.alpha / total, self.beta / total

    @property
    def set_mass(self) -> float:
        """P(S), the mass the target wants on the set."""
        return self.levels[0] * len(self.tokens)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """No set has a wanted rate."""
        return ()

    def contexts(self, objective: ObjectiveOptions) -> str:
        """The texts to train on: the source experiment's random tokens unless others are asked for."""
        return objective.contexts or "random"

    @staticmethod
    def default_lora(objective: ObjectiveOptions) -> LoraOptions:
        """Attention and MLP."""
        return LoraOptions()

    @staticmethod
    def needs_teacher(objective: ObjectiveOptions) -> bool:
        """Whether a step holds the base's states beside the model's."""
        return objective.kl_to_base > 0

    def check(self, train: TrainOptions, lora: LoraOptions, objective: ObjectiveOptions) -> None:
        """Raises XFactorError for options that do not go together with this target."""
        if objective.sequence_level:
            raise XFactorError("`sequence_level=True` needs `goal.rate`")
        if objective.rate != RateOptions():
            raise XFactorError("`same_rate`, `prompts`, `temperature`, `top_k` and `top_p` need `goal.rate`")
        if lora.head:
            raise XFactorError(f"`lora.target={lora.target}` needs `goal.rate`, `goal.strength` or `goal`")
        if train.method == "full" and objective.kl_to_base:
            raise XFactorError("`kl_to_base` needs `method=lora`: without an adapter to switch off there is no base")

    def record(self) -> dict[str, Any]:
        return {"kind": "uniform", "alpha": self.alpha, "beta": self.beta}

    def probabilities(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """P as a float32 tensor of shape (V,), summing to 1."""
        inside, outside = self.levels
        mask = self.tokens.mask(device)
        return torch.full(mask.shape, outside, dtype=torch.float32, device=mask.device).masked_fill_(mask, inside)


@dataclass(frozen=True)
class Goal:
    """One token set and how much of it is wanted: a rate in [0, 1), or the tilt's strength itself.

    Raises:
        XFactorError: not exactly one of the two is given, or it is out of range.
    """

    tokens: TokenSet
    rate: float | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.strength is None):
            raise XFactorError("give either `goal.rate` or `goal.strength`, and not both")
        if self.rate is not None and not 0 <= self.rate < 1:
            raise XFactorError(f"`goal.rate` must be at least 0 and below 1; got {self.rate:g}")
        if self.strength is not None and not abs(self.strength) <= MAX_STRENGTH:
            raise XFactorError(
                f"`goal.strength` must be between -{MAX_STRENGTH:g} and {MAX_STRENGTH:g}; got {self.strength}"
            )

    def record(self) -> dict[str, Any]:
        return {"tokens": self.tokens.record(), "rate": self.rate, "strength": self.strength}


@dataclass(frozen=True)
class TiltedTarget:
    """The base model itself, tilted: q(i|c) proportional to p(i|c) exp(sum_k lambda_k 1[i in S_k]); see `tilt`.

    The strengths lambda of goals with a rate are solved when training starts, from the base's own probabilities,
    and corrected on samples of the adapted model.

    Raises:
        XFactorError: no goal, goals over different vocabularies, the same set twice, or rates and strengths mixed.
    """

    goals: tuple[Goal, ...]

    def __post_init__(self) -> None:
        if not self.goals:
            raise XFactorError("a tilted target needs at least one goal")
        if len({goal.tokens.vocab_size for goal in self.goals}) > 1:
            raise XFactorError("all goals must be sets of one vocabulary")
        if len({goal.tokens.ids for goal in self.goals}) < len(self.goals):
            raise XFactorError("two goals mean the same tokens; drop one")
        if len({goal.rate is None for goal in self.goals}) > 1:
            raise XFactorError("give every goal a rate, or every goal a strength")

    @classmethod
    def of(cls, tokens: TokenSet, rate: float | None = None, *, strength: float | None = None) -> TiltedTarget:
        """The target with one set."""
        return cls((Goal(tokens, rate, strength),))

    @property
    def tokens(self) -> TokenSet:
        """The first goal's set."""
        return self.goals[0].tokens

    @property
    def rates(self) -> list[float] | None:
        """The wanted rates, or None when strengths are given instead."""
        return [goal.rate for goal in self.goals if goal.rate is not None] or None

    def members(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """F, membership in every set, float32 (K, V)."""
        return torch.stack([goal.tokens.mask(device) for goal in self.goals]).float()

    def contexts(self, objective: ObjectiveOptions) -> str:
        """The texts to train on: the base's own samples unless others are asked for."""
        return objective.contexts or "self"

    @staticmethod
    def default_lora(objective: ObjectiveOptions) -> LoraOptions:
        """The set head; to plan whole texts also attention and MLP."""
        return LoraOptions(target="all,head" if objective.sequence_level else "head")

    @staticmethod
    def needs_teacher(objective: ObjectiveOptions) -> bool:
        """The base is the teacher."""
        return True

    def check(self, train: TrainOptions, lora: LoraOptions, objective: ObjectiveOptions) -> None:
        """Raises XFactorError for options that do not go together with this target."""
        if train.method == "full":
            raise XFactorError("a rate needs `method=lora`: with `method=full` there is no base left to be tilted")
        if lora.variant == "pissa":
            raise XFactorError("`lora.variant=pissa` takes a part out of the base, which a rate needs whole")
        if objective.kl_to_base:
            raise XFactorError("`kl_to_base` belongs to the uniform target; a rate stays nearest the base as it is")
        if objective.sequence_level and self.rates is None:
            raise XFactorError("`sequence_level=True` needs `goal.rate`, not `goal.strength`")
        if objective.sequence_level and lora.target == "head":
            raise XFactorError("`sequence_level=True` plans with attention and MLP; use `lora.target=all,head`")
        if objective.sequence_level and not lora.head and replace(objective.rate, same_rate=None) != RateOptions():
            raise XFactorError(
                "`sequence_level=True` without a set head holds its rate at temperature 1 after the model's own "
                "openings; add `head` to `lora.target`, or leave out `prompts`, `temperature`, `top_k` and `top_p`"
            )
        if objective.rate != RateOptions() and self.rates is None:
            raise XFactorError("`goal.strength` is taken as it is; to say where a rate holds give `goal.rate`")
        if objective.rate.same_rate == "everywhere" and not self.looks(lora, objective):
            raise XFactorError(
                "`same_rate=everywhere` is for the set head alone, fitted in one go: it needs a rate above 0 and "
                "`lora.target=head`, without `sequence_level` and `contexts`, and with `early_stop`"
            )

    def looks(self, lora: LoraOptions, objective: ObjectiveOptions) -> bool:
        """Whether the set head is fitted to hold its rate after every family of prompts."""
        alone = lora.target == "head" and not objective.sequence_level and objective.early_stop
        alone = alone and objective.contexts in (None, "self")
        return alone and any(self.rates or ()) and objective.rate.same_rate != "on-average"

    def record(self) -> dict[str, Any]:
        return {"kind": "tilted", "goals": [goal.record() for goal in self.goals]}


Target = UniformTarget | TiltedTarget
