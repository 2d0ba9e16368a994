"""The figures, in a light and a dark theme: loss curves, R against KL, memory, time."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from . import arms
from .arms import Arm
from .results import Results, Row
from .tables import model_name

WIDTH = 4.4
FLAT = ("memory", "time")
"""Figures of a few bars, two of which take the place of one other."""
_COLOURS = {
    arms.FULL: "#d1495b", arms.FULL_BF16: "#e8893a", arms.FULL_8BIT_ADAM: "#b8860b", arms.FULL_ADAFACTOR: "#8d6e63",
    arms.LORA_FP32: "#3d6fd6", arms.LORA_BF16: "#2a9d8f", arms.LORA_INT8: "#7b5cd6", arms.LORA_NF4: "#c05299",
}  # fmt: skip
_OTHERS = ("#5b8c5a", "#5f7a8a", "#a0785a", "#8a5f7a", "#6a8a5f", "#5f6e8a", "#8a7a5f", "#7a5f8a")


@dataclass(frozen=True)
class Theme:
    """Colours of everything but the data; figures have no background of their own."""

    name: str
    ink: str
    faint: str


LIGHT = Theme("light", "#22262e", "#d5d9e0")
DARK = Theme("dark", "#dfe3ea", "#3a414d")


def colours(rows: list[Row]) -> dict[Arm, str]:
    """A colour an arm, the same in every figure."""
    others = iter(_OTHERS * (1 + len(rows) // len(_OTHERS)))
    return {row.arm: _COLOURS.get(row.arm) or next(others) for row in rows}


def figures(results: Results, theme: Theme) -> dict[str, tuple[Figure, str]]:
    """name -> (figure, what it shows in a sentence); only those that there are results for."""
    train = [row for row in results.of("train") if row.good]
    shape = [row for row in results.of("shape") if row.good]
    made: dict[str, tuple[Figure, str]] = {}
    with matplotlib.rc_context(_style(theme)):
        if train:
            made["loss"] = (
                _loss_curves(results, train),
                "Loss over the steps, mean of the seeds; the band is their range.",
            )
            made["rate-kl"] = (
                _rate_against_kl(results, train, theme),
                "R against KL from the base, a point a seed. The line is an exact logit bias on the set: no training.",
            )
        for index, model in enumerate(dict.fromkeys(row.model for row in results.of("source"))):
            rows = [r for r in results.of("source", model=model) if r.good and r.arm.method != "none"]
            if rows:
                name = "source-loss" + (f"-{index}" if index else "")
                made[name] = (
                    _source_curves(results, rows),
                    f"The source’s rates on {model_name(model)}: loss over the steps.",
                )
        if shape:
            where = f"At the shape of {model_name(shape[0].model)}, random weights"
            made["memory"] = _bars(shape, "train_peak", "peak of training, GiB", 1 / 1024), f"{where}: peak memory."
            made["time"] = _bars(shape, "step_seconds", "seconds a step", 1.0), f"{where}: time of a step."
    return made


def save_png(results: Results, folder: Path) -> list[Path]:
    """Write every figure in the light theme on white into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (figure, _) in figures(results, LIGHT).items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=160, facecolor="white", metadata={"Software": None})
        plt.close(figure)
    return files


def svg(figure: Figure) -> bytes:
    """The figure as SVG, without a date so that equal results give equal files."""
    buffer = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "xfactor"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def _style(theme: Theme) -> dict:
    return {
        "font.size": 9, "font.family": "sans-serif", "axes.edgecolor": theme.faint, "axes.labelcolor": theme.ink,
        "text.color": theme.ink, "xtick.color": theme.ink, "ytick.color": theme.ink, "grid.color": theme.faint,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False,
    }  # fmt: skip


def _new(height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
    axes.grid(alpha=0.6, lw=0.6)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2, fontsize=8.5, handlelength=1.4, columnspacing=1.2
    )


def _curve(axes: Axes, row: Row, colour: str, label: str, line: str = "-") -> None:
    """Mean over seeds, lightly smoothed since every step has its own batch, and the seeds' range."""
    runs = [smooth(record["loss"]) for record in row.good]
    steps = range(1, min(map(len, runs)) + 1)
    columns = list(zip(*runs, strict=False))
    axes.plot(steps, [sum(c) / len(c) for c in columns], line, color=colour, lw=1.6, label=label)
    if len(runs) > 1:
        axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, lw=0)


def smooth(values: list[float], share: float = 0.03) -> list[float]:
    """Centred moving mean over a few per cent of the steps; the ends use what there is."""
    half = round(len(values) * share / 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _floor_line(axes: Axes, results: Results, rows: list[Row]) -> None:
    floors = {results.floor(row) for row in rows if row.arm.method == "lora"} - {None}
    for floor in floors:
        axes.axhline(floor, color=plt.rcParams["text.color"], lw=0.9, ls=(0, (4, 3)), label="floor with a frozen head")


def _loss_curves(results: Results, rows: list[Row]) -> Figure:
    figure, axes = _new(3.9)
    shades = colours(rows)
    for row in rows:
        if row.arm in _COLOURS or len(rows) <= 10:  # a whole grid of ranks would be a tangle
            _curve(axes, row, shades[row.arm], _short(row))
    _floor_line(axes, results, rows)
    _log_axis(axes)
    axes.set_xlabel("step")
    axes.set_ylabel("KL(target || model), nats")
    _legend(figure, axes)
    return figure


def _source_curves(results: Results, rows: list[Row]) -> Figure:
    figure, axes = _new(3.9)
    rates = sorted({row.lr for row in rows})
    for row in rows:
        full = row.arm.method == "full"
        colour = plt.get_cmap("viridis")(0.25 + 0.65 * rates.index(row.lr) / max(1, len(rates) - 1))
        _curve(
            axes, row, colour, f"{'full' if full else 'LoRA r=' + str(row.arm.r)}, lr {row.lr:g}", "-" if full else "--"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("KL(target || model), nats")
    axes.set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def _rate_against_kl(results: Results, rows: list[Row], theme: Theme) -> Figure:
    figure, axes = _new(3.9)
    base = results.base(rows[0])
    if base and base["bias"]:
        points = [(0.0, base["scores"]["rate"]), *((p["kl_from_base"], p["rate"]) for p in base["bias"])]
        axes.plot(*zip(*points, strict=True), "-", color=theme.ink, lw=1, marker=".", ms=4, label="exact logit bias")
    shades = colours(rows)
    for row in rows:
        points = [(r["scores"]["kl_from_base"], r["scores"]["rate"]) for r in row.good]
        marker = "o" if row.arm.method == "full" else "D"
        axes.plot(*zip(*points, strict=True), marker, color=shades[row.arm], ms=5, alpha=0.85, label=_short(row))
    axes.set_xlabel("KL(model || base), nats per token")
    axes.set_ylabel("R, sampled")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(left=0)
    _legend(figure, axes)
    return figure


def _bars(rows: list[Row], metric: str, label: str, unit: float) -> Figure:
    figure, axes = _new(0.34 * len(rows) + 0.7)
    shades = colours(rows)
    values = [row.estimate(metric).mean * unit if row.estimate(metric) else 0.0 for row in rows]
    bars = axes.barh(range(len(rows)), values, color=[shades[row.arm] for row in rows], height=0.66)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [_short(row) for row in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(right=max(values) * 1.14)
    axes.set_xlabel(label)
    return figure


def _short(row: Row) -> str:
    """The label without what most arms have in common."""
    return row.label.replace(", attention + MLP", "")
