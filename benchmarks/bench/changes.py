"""What moved between two benchmarks, and whether by more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch

from .results import METRICS, Metric, Record, Results, Row
from .stats import welch

LEVEL = 0.99
"""Of the intervals of a difference: about one in a hundred figures that did not change is shown all the same."""
MEMORY_SHARE, MEMORY_MIB = 0.02, 8.0
TIME_SHARE = 0.05
"""What peaks and times of the same program on the same machine may differ by from one day to the next."""


@dataclass(frozen=True)
class Change:
    """A figure in two benchmarks. `noise` is how large a difference may be by chance, None where nobody can tell."""

    arm: str
    metric: Metric
    old: float
    new: float
    noise: float | None

    @property
    def difference(self) -> float:
        return self.new - self.old

    @property
    def moved(self) -> bool:
        return self.noise is not None and abs(self.difference) > self.noise

    @property
    def verdict(self) -> str:
        """ "better", "worse", "moved" where neither direction is better, "noise", or "one seed"."""
        if self.noise is None:
            return "one seed"
        if not self.moved:
            return "noise"
        if self.metric.lower_is_better is None:
            return "moved"
        return "better" if (self.difference < 0) == self.metric.lower_is_better else "worse"


def compare(old: Results, new: Results) -> list[Change]:
    """Every figure that both benchmarks have, arm by arm. Time and memory only if the hardware is the same."""
    before = {row.key: row for row in old.rows}
    same = same_hardware(old, new)
    pairs = [(before[row.key], row) for row in new.rows if row.key in before and row.group != "sweep"]
    metrics = [metric for metric in METRICS.values() if same or metric.noise not in ("time", "memory")]
    found = (_change(metric, first, second) for first, second in pairs for metric in metrics)
    return [change for change in found if change is not None]


def same_hardware(old: Results, new: Results) -> bool:
    """Same processor, threads and GPU, so that times and peaks can be compared."""
    keys = ("cpu", "threads", "gpu")
    return all(old.checks["hardware"][key] == new.checks["hardware"][key] for key in keys)


def differing_settings(old: Results, new: Results) -> list[str]:
    """Labels of arms that both have, with other settings (steps, samples, ...): their figures mean something else."""
    before = {row.key: row for row in old.rows}
    return [row.label for row in new.rows if row.key in before and row.settings != before[row.key].settings]


def only_in(first: Results, second: Results) -> list[str]:
    """Arms that `first` has a result for and `second` has not."""
    there = {row.key for row in second.rows if row.good}
    return [f"{row.group}: {row.label}" for row in first.rows if row.good and row.key not in there]


def _change(metric: Metric, old: Row, new: Row) -> Change | None:
    values = old.values(metric.key), new.values(metric.key)
    if not all(values):
        return None
    means = [mean(side) for side in values]
    if metric.key == "step_seconds":
        noise = _time_noise(old, new)
    elif metric.noise == "time":  # tokens/s says the same as s/step once more
        return None
    elif metric.noise == "exact":
        noise = 0.0
    elif metric.noise == "memory":
        noise = memory_noise(means[0])
    else:
        noise = _seed_noise(metric, (old, new), values)
    return Change(f"{new.group}: {new.label}", metric, *means, noise)


def memory_noise(mib: float) -> float:
    """A fixed allowance, since each arm has one peak from one fresh process."""
    return max(MEMORY_MIB, MEMORY_SHARE * mib)


def _seed_noise(metric: Metric, rows: tuple[Row, Row], values: tuple[Sequence[float], Sequence[float]]) -> float | None:
    """Welch's test over seeds; with one seed, the two runs' own intervals, if the metric has them."""
    if min(map(len, values)) > 1:
        return welch(*values, LEVEL)[1]
    intervals = [metric.interval(row.good[0]) for row in rows]
    if None in intervals:
        return None
    widen = 2.576 / 1.96  # 95 % to 99 %
    return widen * math.hypot(*((high - low) / 2 for low, high in intervals))


def _time_noise(old: Row, new: Row) -> float:
    """The largest of a fixed share, the spread of single steps (bootstrap of the medians), and Welch's over seeds."""
    steps = math.hypot(*(_median_error(row.good) for row in (old, new)))
    values = [row.values("step_seconds") for row in (old, new)]
    seeds = welch(*values, LEVEL)[1] if min(map(len, values)) > 1 else 0.0
    return max(TIME_SHARE * mean(values[0]), steps, seeds)


def _median_error(records: Sequence[Record], resamples: int = 500) -> float:
    """Half width of the 99 % interval of the median step, over the steps of all runs."""
    steps = torch.tensor([s for record in records for s in record["seconds"][1:] or record["seconds"]])
    picks = torch.randint(len(steps), (resamples, len(steps)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(steps[picks].median(dim=1).values, torch.tensor([0.005, 0.995])).tolist()
    return (high - low) / 2
