"""The figures of a record: where each lies, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

from ..store import Record
from ..tables import file_size, number, share, whole

REACHED = 0.9
Value = Callable[[Record], float | None]


@dataclass(frozen=True)
class Metric:
    """A figure of a run.

    Attributes:
        value: from a record; None where it has none.
        scored: name of its own 95 % interval among the scores, if it has one.
        most: the largest value that is possible.
    """

    title: str
    value: Value
    show: Callable[[float], str] = number
    scored: str = ""
    most: float = float("inf")

    def interval(self, record: Record) -> tuple[float, float] | None:
        """Its own interval within one run."""
        return tuple(record["scores"][self.scored]) if self.scored and "scores" in record else None


def at(*path: str) -> Value:
    """The value at a path of keys; None where one is missing."""

    def value(record: Record) -> float | None:
        for key in path:
            record = (record or {}).get(key)
        return record

    return value


def peak(key: str) -> Value:
    """A peak in MiB, on the GPU if there is one. Runs of older benchmarks may have shared a process: no figure."""

    def value(record: Record) -> float | None:
        found = record.get(key) if record.get("fresh_process", True) else None
        return found.get("cuda_mib", found["rss_mib"]) if found else None

    return value


def first_loss(record: Record) -> float | None:
    return record["loss"][0] if record.get("loss") else None


def final_loss(record: Record) -> float | None:
    """Mean of the last tenth of the steps, since every step has another batch."""
    losses = record.get("loss")
    return fmean(losses[-max(1, len(losses) // 10) :]) if losses else None


def step_seconds(record: Record) -> float | None:
    """Median without the first step, which allocates and compiles."""
    seconds = record.get("seconds")
    return median(seconds[1:] or seconds) if seconds else None


def tokens_per_second(record: Record) -> float | None:
    seconds, settings = step_seconds(record), record["spec"]["settings"]
    return settings["batch_size"] * settings["seq_len"] / seconds if seconds else None


def steps_to_rate(record: Record) -> int | None:
    """The first probe with R >= 0.9; None if none had."""
    return next((step for step, rate in record.get("probes", []) if rate >= REACHED), None)


METRICS = {
    "rate": Metric("R (95 %)", at("scores", "rate"), scored="interval", most=1.0),
    "set_mass": Metric("mass on set", at("scores", "set_mass"), share),
    "loss_first": Metric("loss, first step", first_loss),
    "loss_last": Metric("loss, last tenth", final_loss),
    "kl": Metric("KL from base, nats/token", at("scores", "kl_from_base"), scored="kl_interval"),
    "perplexity": Metric("perplexity under base", at("scores", "perplexity")),
    "distinct_2": Metric("distinct-2", at("scores", "distinct_2"), share),
    "prose_before": Metric("prose before", at("held_out", "before")),
    "prose": Metric("prose perplexity", at("held_out", "after")),
    "forgetting": Metric("forgetting ×", at("held_out", "ratio")),
    "trainable": Metric("trainable", at("trainable_parameters"), whole),
    "file_bytes": Metric("file", at("file_bytes"), file_size),
    "load_peak": Metric("load peak, MiB", peak("load_peak"), whole),
    "train_peak": Metric("train peak, MiB", peak("train_peak"), whole),
    "step_seconds": Metric("s/step", step_seconds),
    "tokens_per_second": Metric("tokens/s", tokens_per_second, whole),
}
