"""What moved between two benchmarks, and whether by more than noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import stdev

from ..tables import number
from .metrics import METRICS
from .results import Results, Row

WIDER = 2.576 / 1.96
"""From 95 % to 99 %: about one in a hundred figures that did not change is shown all the same."""
MEMORY_SHARE, MEMORY_MIB, TIME_SHARE = 0.02, 8.0, 0.05
"""What peaks and times of the same program on the same machine may differ by from one day to the next."""


@dataclass(frozen=True)
class Change:
    """A figure in two benchmarks. `noise` is how large a difference may be by chance, None where nobody can tell."""

    arm: str
    metric: str
    old: float
    new: float
    noise: float | None

    @property
    def verdict(self) -> str:
        """ "better", "worse", "moved" where neither direction is better, "noise", or "one seed"."""
        lower_is_better, difference = METRICS[self.metric].lower_is_better, self.new - self.old
        if self.noise is None or abs(difference) <= self.noise:
            return "one seed" if self.noise is None else "noise"
        return "moved" if lower_is_better is None else "better" if (difference < 0) == lower_is_better else "worse"

    def __str__(self) -> str:
        difference = self.new - self.old
        moved = ("+" if difference >= 0 else "-") + number(abs(difference))
        share = f", {difference / abs(self.old):+.1%}" if self.old else ""
        noise = "unknown" if self.noise is None else f"± {number(self.noise)}"
        figures = f"{number(self.old)} → {number(self.new)} ({moved}{share}; noise {noise})"
        return f"{self.verdict:8}  {METRICS[self.metric].title}: {figures}"


def compare(old: Results, new: Results) -> list[Change]:
    """Every figure that both benchmarks have, arm by arm. Time and memory only if the hardware is the same."""
    before, same, found = {row.key: row for row in old.rows}, same_hardware(old, new), []
    for row in new.rows:
        other = before.get(row.key)
        for key, metric in METRICS.items() if other and row.group != "sweep" else ():
            sides = other.estimate(key), row.estimate(key)
            if all(sides) and metric.noise and (same or metric.noise not in ("time", "memory")):
                means = (side.mean for side in sides)
                found.append(Change(f"{row.group}: {row.label}", key, *means, _noise(key, other, row)))
    return found


def _noise(key: str, *rows: Row) -> float | None:
    """Both intervals together, over seeds or of the one run; None for one seed whose metric has no interval.

    Counts are exact. Peaks have a fixed allowance. A time's is the largest of a fixed share of it, its interval, and
    the spread of single steps (1.253 s / sqrt(n) is the standard error of a median).
    """
    metric, sides = METRICS[key], [row.estimate(key) for row in rows]
    interval = WIDER * math.hypot(*(side.half for side in sides))
    if metric.noise == "exact":
        return 0.0
    if metric.noise == "memory":
        return max(MEMORY_MIB, MEMORY_SHARE * sides[0].mean)
    if metric.noise == "time":
        steps = [[s for record in row.good for s in record["seconds"][1:]] for row in rows]
        errors = (1.253 * stdev(side) / math.sqrt(len(side)) for side in steps if len(side) > 1)
        return max(TIME_SHARE * sides[0].mean, interval, 2.576 * math.hypot(*errors))
    told = all(len(row.values(key)) > 1 or metric.interval(row.good[0]) for row in rows)
    return interval if told else None


def same_hardware(old: Results, new: Results) -> bool:
    """Same processor, threads and GPU, so that times and peaks can be compared."""
    first, second = old.checks["hardware"], new.checks["hardware"]
    return all(first[key] == second[key] for key in ("cpu", "threads", "gpu"))


def caveats(old: Results, new: Results) -> list[str]:
    """What the two benchmarks do not have in common."""
    before, after = ({row.key: row for row in side.rows if row.good} for side in (old, new))
    alone = [("old", row) for key, row in before.items() if key not in after]
    alone += [("new", row) for key, row in after.items() if key not in before]
    other = [row for key, row in after.items() if key in before and row.settings != before[key].settings]
    return [
        *([] if same_hardware(old, new) else ["not the same hardware: times and peaks of memory are not compared"]),
        *(f"other settings, so its figures mean something else: {row.label}" for row in other),
        *(f"only in the {name} benchmark: {row.group}: {row.label}" for name, row in alone),
    ]
