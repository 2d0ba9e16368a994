"""The findings in short: an 8-bit adapter (else another adapter) against full fine-tuning in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import arms
from .results import Results, Row
from .tables import model_name, number, size

PREFERRED = (arms.LORA_INT8, arms.LORA_NF4, arms.LORA_BF16, arms.LORA_FP32)
Show = Callable[[float], str]


@dataclass(frozen=True)
class Headline:
    """What an adapter gives, what full fine-tuning gives, and words for it."""

    title: str
    lora: str
    full: str
    note: str


def headlines(results: Results) -> list[Headline]:
    """As many as there are results for; every figure is one of the tables'."""
    shape = results.of("shape")
    where = f"at the shape of {model_name(shape[0].model)}" if shape else ""
    wanted: list[tuple[str, str, str, Show, str]] = [  # title, group, metric, how to show it, note
        ("R, share of set tokens", "train", "rate", number, "sampled"),
        (
            "forgetting",
            "train",
            "forgetting",
            lambda x: f"{number(x)} ×",
            "perplexity of plain text, after over before",
        ),
        ("file to keep", "train", "file_bytes", size, ""),
        ("peak memory of training", "shape", "train_peak", lambda x: f"{x / 1024:.2f} GiB", where),
        ("time of a step", "shape", "step_seconds", lambda x: f"{x:.2f} s", where),
    ]
    made = (_headline(pair_of(results, group), title, *rest) for title, group, *rest in wanted)
    return [headline for headline in made if headline]


def _headline(pair: tuple[Row, Row] | None, title: str, metric: str, show: Show, note: str) -> Headline | None:
    estimates = [row.estimate(metric) for row in pair] if pair else [None]
    if None in estimates:
        return None
    lora, full = estimates
    if metric == "rate" and lora.low < lora.high and full.low < full.high:
        spans = (f"{number(max(0, e.low))}–{number(min(1, e.high))}" for e in (lora, full))
        note += ", 95 % intervals " + " and ".join(spans)
    if metric in ("file_bytes", "train_peak", "step_seconds") and lora.mean:
        note = ", ".join(part for part in (_ratio(full.mean / lora.mean), note) if part)
    return Headline(title, show(lora.mean), show(full.mean), note)


def _ratio(ratio: float) -> str:
    return f"a factor of {number(ratio)}" if ratio >= 1 else f"{number(1 / ratio)} times as much"


def compared(results: Results) -> tuple[str, str] | None:
    """Labels of the two arms, for the heading."""
    pair = pair_of(results, "train") or pair_of(results, "shape")
    return (pair[0].label, pair[1].label) if pair else None


def pair_of(results: Results, group: str) -> tuple[Row, Row] | None:
    """(an adapter's row, that of full fine-tuning) of a group, or None when either has no result."""
    full = results.find(group, arms.FULL)
    adapters = [row for row in results.of(group) if row.arm.method == "lora" and row.good]
    preferred = [row for arm in PREFERRED for row in adapters if row.arm == arm]
    lora = next(iter([*preferred, *adapters]), None)
    return (lora, full) if lora and full else None
