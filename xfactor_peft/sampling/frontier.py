"""The frontier: what an exact logit bias pays for the same rate, measured the same way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..base.split_model import SplitModel
from ..options import EvalOptions
from ..tokens.token_set import TokenSet
from .calibration import calibrate
from .metrics import Evaluation, evaluate


@dataclass(frozen=True)
class Frontier:
    """The logit bias whose samples hold the same share of the set.

    Attributes:
        strength: the bias, lambda.
        kl: KL(tilted base || base) per token on its own samples at exactly the wanted mass: the nearest measured
            point, moved along dKL/dm = lambda.
        ratio: the adapter's KL divided by it; below 1 means less damage than any constant bias does.
    """

    strength: float
    kl: float
    ratio: float
    evaluation: Evaluation

    def record(self) -> dict[str, Any]:
        scores = self.evaluation
        return {"strength": self.strength, "kl": self.kl, "ratio": self.ratio, "set_mass": scores.set_mass,
                "rate": scores.rate, "kl_measured": scores.kl_from_base, "kl_interval": scores.kl_interval,
                "perplexity": scores.perplexity, "distinct_2": scores.distinct_2, "spread": scores.spread}  # fmt: skip


def measure_frontier(
    split_model: SplitModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: TokenSet,
    scores: Evaluation,
    options: EvalOptions,
    *,
    start: float = 0.0,
    adapter_off: Callable[[], AbstractContextManager] | None = None,
    rounds: int = 6,
) -> Frontier | None:
    """Find the logit bias on the base with the set mass of `scores`, on the same prompts, settings and seed.

    Compared at equal *expected* R (the mean set mass along own samples), which carries less sampling noise than R.
    None when the mass is 0 or 1 up to rounding, where no finite bias gives it.
    """
    wanted = torch.tensor([scores.set_mass], dtype=torch.float64)
    if not 1e-7 < scores.set_mass < 1 - 1e-5:
        return None
    mask, found = tokens.mask(split_model.weight.device).float(), []

    def measure(strength: torch.Tensor, _: int) -> torch.Tensor:
        tilted = SplitModel(split_model.model, float(strength) * mask)
        point = evaluate(tilted, tokenizer, tokens, options, base=SplitModel(split_model.model))
        found.append((abs(point.set_mass - scores.set_mass), float(strength), point))
        return torch.tensor([point.set_mass], dtype=torch.float64)

    with (adapter_off or nullcontext)():
        calibrate(measure, torch.tensor([start], dtype=torch.float64), wanted, least=1, most=rounds, tolerance=0.01)
    _, bias, best = min(found, key=lambda item: item[0])
    kl = best.kl_from_base + bias * (scores.set_mass - best.set_mass)
    return Frontier(bias, kl, scores.kl_from_base / kl if kl > 1e-9 else float("nan"), best)
