"""From JSON files to rows: one row an arm, with every metric as a mean over seeds and its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from . import store
from .arms import Arm
from .plan import GROUPS
from .runner import MANIFEST, require_checks
from .stats import Estimate, over_seeds

Record = dict[str, Any]
REACHED = 0.9


@dataclass(frozen=True)
class Metric:
    """A figure of a run.

    Attributes:
        value: from a record; None where it has none.
        interval: its own 95 % interval within one run, if it has one.
        noise: what a difference between two benchmarks is judged by: "seeds", "time", "memory" or "exact".
        lower_is_better: None where neither direction is.
    """

    key: str
    title: str
    value: Callable[[Record], float | None]
    interval: Callable[[Record], tuple[float, float] | None] = lambda record: None
    noise: str = "seeds"
    lower_is_better: bool | None = None


def _score(key: str) -> Callable[[Record], float | None]:
    return lambda record: record.get("scores", {}).get(key)


def _own(key: str) -> Callable[[Record], tuple[float, float] | None]:
    return lambda record: tuple(record["scores"][key]) if "scores" in record else None


def final_loss(record: Record) -> float | None:
    """Mean of the last tenth of the steps, since every step has another batch."""
    losses = record.get("loss") or []
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else None


def step_seconds(record: Record) -> float | None:
    """Median without the first step, which allocates and compiles."""
    seconds = record.get("seconds") or []
    return median(seconds[1:] or seconds) if seconds else None


def tokens_per_second(record: Record) -> float | None:
    seconds, settings = step_seconds(record), record["spec"]["settings"]
    return settings["batch_size"] * settings["seq_len"] / seconds if seconds else None


def steps_to_rate(record: Record) -> int | None:
    """The first probe with R >= 0.9; None if none had."""
    return next((step for step, rate in record.get("probes", []) if rate >= REACHED), None)


def peak(key: str) -> Callable[[Record], float | None]:
    """A peak in MiB, on the GPU if there is one; only of runs that found their process fresh."""

    def value(record: Record) -> float | None:
        found = record.get(key)
        if not found or not record["fresh_process"]:
            return None
        return found.get("cuda_mib", found["rss_mib"])

    return value


METRICS = {
    metric.key: metric
    for metric in (
        Metric("rate", "R, sampled", _score("rate"), _own("interval")),
        Metric("set_mass", "mass on the set", _score("set_mass")),
        Metric("loss_first", "loss, first step", lambda record: (record.get("loss") or [None])[0]),
        Metric("loss_last", "loss, last tenth", final_loss, lower_is_better=True),
        Metric("kl", "KL from base, nats/token", _score("kl_from_base"), _own("kl_interval"), lower_is_better=True),
        Metric("perplexity", "perplexity of samples under base", _score("perplexity"), lower_is_better=True),
        Metric("distinct_2", "distinct-2", _score("distinct_2"), lower_is_better=False),
        Metric(
            "forgetting", "held-out perplexity, after / before",
            lambda record: record.get("held_out", {}).get("ratio"), lower_is_better=True,
        ),
        Metric("trainable", "trainable parameters", lambda record: record.get("trainable_parameters"), noise="exact"),
        Metric("file_bytes", "file", lambda record: record.get("file_bytes"), noise="exact"),
        Metric("load_peak", "load peak, MiB", peak("load_peak"), noise="memory", lower_is_better=True),
        Metric("train_peak", "train peak, MiB", peak("train_peak"), noise="memory", lower_is_better=True),
        Metric("step_seconds", "s/step", step_seconds, noise="time", lower_is_better=True),
        Metric("tokens_per_second", "tokens/s", tokens_per_second, noise="time", lower_is_better=False),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """An arm's runs. `lr` is None where seeds could differ in it, that is for arms with a sweep."""

    group: str
    model: str
    arm: Arm
    lr: float | None
    records: tuple[Record, ...]

    @property
    def good(self) -> list[Record]:
        return [record for record in self.records if record["status"] == "ok"]

    @property
    def failures(self) -> list[Record]:
        return [record for record in self.records if record["status"] != "ok"]

    @property
    def label(self) -> str:
        return self.arm.label + (f", lr {self.lr:g}" if self.lr is not None and self.group == "source" else "")

    @property
    def key(self) -> tuple[str, str, str, float | None]:
        return self.group, self.model, self.arm.name, self.lr

    def values(self, metric: str) -> list[float]:
        found = (METRICS[metric].value(record) for record in self.good)
        return [value for value in found if value is not None]

    def estimate(self, metric: str) -> Estimate | None:
        """Mean over seeds; with one seed, the interval of that run."""
        values = self.values(metric)
        if not values:
            return None
        return over_seeds(values, METRICS[metric].interval(self.good[0]))

    @property
    def settings(self) -> dict[str, Any]:
        return self.records[0]["spec"]["settings"]


@dataclass(frozen=True)
class Results:
    """A folder of results: the manifest, the checks, and a row an arm."""

    folder: Path
    manifest: Record
    checks: Record
    rows: tuple[Row, ...]

    def of(self, group: str, *, model: str | None = None) -> list[Row]:
        return [row for row in self.rows if row.group == group and model in (None, row.model)]

    def find(self, group: str, arm: Arm) -> Row | None:
        """The arm's row in a group, if it has a result."""
        return next((row for row in self.of(group) if row.arm == arm and row.good), None)

    def base(self, row: Row) -> Record | None:
        """The untrained model's record that belongs to a row: same model, same token set."""
        for other in self.rows:
            same = other.model == row.model and other.settings["contains"] == row.settings["contains"]
            if other.arm.method == "none" and same and other.good:
                return other.good[0]
        return None

    def floor(self, row: Row) -> float | None:
        """The lowest loss that an arm could reach: 0 when the embedding trains, else the frozen head's."""
        if row.arm.method == "full":
            return 0.0
        base = self.base(row)
        return base["floor"] if base else None

    def commits(self) -> list[str]:
        found = {
            (r["commit"] or "no commit")[:10] + (" (dirty)" if r["dirty"] else "")
            for row in self.rows
            for r in row.records
        }
        return sorted(found)


def load(folder: Path) -> Results:
    """Read a folder; runs that the last benchmark there did not plan are left out.

    Raises:
        XFactorError: the correctness checks have not passed, so that no figure may be shown.
    """
    manifest, checks = store.read(folder / MANIFEST), store.read(folder / store.CHECKS)
    require_checks(checks)
    grouped: dict[tuple, list[Record]] = {}
    for name in (manifest or {}).get("files", []):
        record = store.read(folder / store.RUNS / name)
        if record is not None:
            spec = record["spec"]
            lr = None if spec["group"] == "train" else spec["lr"]
            grouped.setdefault((spec["group"], spec["model"], Arm(**spec["arm"]), lr), []).append(record)
    rows = [Row(*key, tuple(records)) for key, records in grouped.items()]
    rows.sort(key=lambda row: GROUPS.index(row.group))
    return Results(folder, manifest or {}, checks, tuple(rows))
