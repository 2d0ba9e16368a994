"""When training has nothing left to gain."""

from __future__ import annotations

from .sequence.planner import PlanStep


def plateau(losses: list[float], window: int = 100, least: float = 0.01) -> bool:
    """Whether the mean of the last `window` losses is not lower by `least` (a share) than that of the window before."""
    if len(losses) < 2 * window:
        return False
    recent, earlier = sum(losses[-window:]), sum(losses[-2 * window : -window])
    return recent > (1 - least) * earlier


def stop_planning(plan: list[PlanStep], rate: float) -> str | None:
    """Why planning should stop: KL at the wanted rate no longer falls, or texts drift apart; None to go on.

    KL is moved to the wanted rate along dKL/dR = lambda. Texts drift apart when the spread of R between them, over ten
    batches, is three times that of the first five: a mixture of full and empty texts is on its way.
    """
    if plateau([step.kl + step.strength * (rate - step.rate) for step in plan], window=40, least=0.005):
        return "the KL at the wanted rate no longer falls"
    spreads = [step.spread for step in plan]
    if len(spreads) >= 15 and sum(spreads[-10:]) / 10 > 3 * sum(spreads[:5]) / 5:
        return "the texts drift apart"
    return None
