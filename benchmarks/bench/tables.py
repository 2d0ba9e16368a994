"""Tables of text, and figures as text: what the README, table.md and report.html are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .stats import Estimate

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Headers, rows of cells, and a caption; `failed` are the indices of rows that have no result."""

    headers: list[str]
    rows: list[list[str]]
    caption: str = ""
    failed: frozenset[int] = frozenset()

    def markdown(self, *, aligned: bool = True) -> str:
        """The table without its caption; aligned, every column but the first is flush right."""
        head, *lines = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in (self.headers, *self.rows))
        rule = "| --- |" + " ---: |" * (len(self.headers) - 1) if aligned else "|---" * len(self.headers) + "|"
        return "\n".join([f"| {head} |", rule, *(f"| {line} |" for line in lines)])

    def section(self) -> str:
        return f"{self.caption}\n\n{self.markdown()}"


def number(value: float) -> str:
    """Three significant digits without exponents where they are not needed."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    size = abs(value)
    if size < 5e-4:
        return "0.000"  # not "-0.000"
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if size >= unit:
            return f"{value / unit:,.2g} {name}" if size < 100 * unit else f"{value / unit:,.0f} {name}"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


def file_size(count: float) -> str:
    """Bytes as kB, MB or GB."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def share(value: float) -> str:
    return f"{value:.3f}"


def with_interval(estimate: Estimate | None, high: float = float("inf")) -> str:
    """ "0.931 (0.902–0.955)", between 0 and `high`, a share's with its three digits; without a spread only the mean."""
    show = share if high == 1 else number
    if estimate is None:
        return NONE
    if estimate.low == estimate.high:
        return show(estimate.mean)
    centre, span = show(estimate.mean), f"{show(max(0.0, estimate.low))}–{show(min(high, estimate.high))}"
    return centre if span == f"{centre}–{centre}" else f"{centre} ({span})"


def missed(value: float, most: float | None, show: Callable[[float], str]) -> str:
    """The value, and the one wanted where it was missed."""
    return show(value) if most is None or value <= most else f"{show(value)} (wanted ≤ {show(most)})"


def model_name(model: str) -> str:
    """A model's name for people; one with random weights is called by its shape."""
    names = {"demo": "the bundled demo model", "gpt2-medium": "GPT-2 Medium", "tiny-random": "a tiny random model",
             "smollm2": "SmolLM2-135M-Instruct"}  # fmt: skip
    plain = Path(model).name.removesuffix("-shape")
    return names.get(plain, plain)
