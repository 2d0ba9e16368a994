"""The figures: loss curves, R against KL, memory, time. As SVG they follow the reader's light or dark theme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ..tables import model_name
from . import arms
from .results import Results, Row

INK, FAINT = "#22262e", "#d5d9e0"
THEMES = ":root{--ink:#22262e;--faint:#d5d9e0}@media(prefers-color-scheme:dark){:root{--ink:#dfe3ea;--faint:#3a414d}}"
STYLE = {
    "font.size": 9, "font.family": "sans-serif", "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "grid.color": FAINT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "legend.frameon": False, "svg.fonttype": "path", "svg.hashsalt": "xfactor",
}  # fmt: skip
COLOURS = dict(zip(arms.ALL, ("#d1495b", "#e8893a", "#b8860b", "#8d6e63", "#3d6fd6", "#2a9d8f", "#7b5cd6", "#c05299"),
                   strict=True))  # fmt: skip
OTHER = "#5f7a8a"
LOSS_AXES = "step", "KL(target || model), nats"


@dataclass(frozen=True)
class Figure:
    """A figure, its file's name, and what it shows in a sentence; two that are not wide take the place of one."""

    name: str
    caption: str
    picture: plt.Figure
    wide: bool = True


def figures(results: Results) -> Iterator[Figure]:
    """Those that there are results for; each is drawn when it is asked for."""
    train, shape = ([row for row in results.of(group) if row.good] for group in ("train", "shape"))
    with matplotlib.rc_context(STYLE):
        if train:
            caption = "Loss over the steps, mean of the seeds; the band is their range."
            yield Figure("loss", caption, _loss_curves(results, train))
            caption = "R against KL from the base, a point a seed. The line is an exact logit bias: no training."
            yield Figure("rate-kl", caption, _rate_against_kl(results, train))
        for index, model in enumerate(results.models("source")):
            rows = [r for r in results.of("source", model=model) if r.good and r.arm.method != "none"]
            if rows:
                caption = f"The source’s rates on {model_name(model)}: loss over the steps."
                yield Figure("source-loss" + (f"-{index}" if index else ""), caption, _source_curves(rows))
        if shape:
            where = f"At the shape of {model_name(shape[0].model)}, random weights"
            memory = _bars(shape, "train_peak", "peak of training, GiB", 1 / 1024)
            yield Figure("memory", f"{where}: peak memory.", memory, wide=False)
            time = _bars(shape, "step_seconds", "seconds a step")
            yield Figure("time", f"{where}: time of a step.", time, wide=False)


def save_png(results: Results, folder: Path) -> list[Path]:
    """Write every figure on white into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for figure in figures(results):
        files.append(folder / f"{figure.name}.png")
        figure.picture.savefig(files[-1], dpi=160, facecolor="white", metadata={"Software": None})
        plt.close(figure.picture)
    return files


def svg(figure: Figure) -> bytes:
    """The figure as SVG, without a date so that equal results give equal files, in the colours of the theme."""
    buffer = BytesIO()
    figure.picture.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure.picture)
    text = buffer.getvalue().decode().replace("*{", THEMES + "*{", 1)
    return text.replace(f": {INK}", ": var(--ink)").replace(f": {FAINT}", ": var(--faint)").encode()


def _new(labels: tuple[str, str], height: float = 3.9) -> tuple[plt.Figure, Axes]:
    picture, axes = plt.subplots(figsize=(4.4, height), layout="constrained")
    axes.grid(alpha=0.6, lw=0.6)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    return picture, axes


def _legend(picture: plt.Figure) -> plt.Figure:
    picture.legend(loc="outside lower center", ncols=2, fontsize=8.5, handlelength=1.4, columnspacing=1.2)
    return picture


def _short(row: Row) -> str:
    """The label without what most arms have in common."""
    return row.label.replace(", attention + MLP", "")


def _curve(axes: Axes, row: Row, label: str, colour: object, line: str = "-") -> None:
    """Mean over seeds, lightly smoothed since every step has its own batch, and the seeds' range."""
    columns = list(zip(*(smooth(record["loss"]) for record in row.good), strict=False))
    steps = range(1, len(columns) + 1)
    axes.plot(steps, [sum(c) / len(c) for c in columns], line, color=colour, lw=1.6, label=label)
    axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, lw=0)


def smooth(values: list[float], share: float = 0.03) -> list[float]:
    """Centred moving mean over a few per cent of the steps; the ends use what there is."""
    half = round(len(values) * share / 2)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _loss_curves(results: Results, rows: list[Row]) -> plt.Figure:
    picture, axes = _new(LOSS_AXES)
    for row in rows:
        if row.arm in COLOURS or len(rows) <= 10:  # a whole grid of ranks would be a tangle
            _curve(axes, row, _short(row), COLOURS.get(row.arm, OTHER))
    for floor in {results.floor(row) for row in rows if row.arm.method == "lora"} - {None}:
        axes.axhline(floor, color=INK, lw=0.9, ls=(0, (4, 3)), label="floor with a frozen head")
    axes.set_yscale("log")
    return _legend(picture)


def _source_curves(rows: list[Row]) -> plt.Figure:
    picture, axes = _new(LOSS_AXES)
    rates = sorted({row.lr for row in rows})
    for row in rows:
        colour = plt.get_cmap("viridis")(0.25 + 0.65 * rates.index(row.lr) / max(1, len(rates) - 1))
        _curve(axes, row, _short(row).replace(", fp32", ""), colour, "-" if row.arm.method == "full" else "--")
    axes.set_ylim(bottom=0)
    return _legend(picture)


def _rate_against_kl(results: Results, rows: list[Row]) -> plt.Figure:
    picture, axes = _new(("KL(model || base), nats per token", "R, sampled"))
    if base := results.base(rows[0]):
        points = [(0.0, base["scores"]["rate"]), *((p["kl_from_base"], p["rate"]) for p in base["bias"])]
        axes.plot(*zip(*points, strict=True), "-", color=INK, lw=1, marker=".", ms=4, label="exact logit bias")
    for row in rows:
        marker, colour = "o" if row.arm.method == "full" else "D", COLOURS.get(row.arm, OTHER)
        axes.plot(row.values("kl"), row.values("rate"), marker, color=colour, ms=5, alpha=0.85, label=_short(row))
    axes.set(xlim=(0, None), ylim=(-0.03, 1.03))
    return _legend(picture)


def _bars(rows: list[Row], metric: str, label: str, unit: float = 1.0) -> plt.Figure:
    picture, axes = _new((label, ""), 0.34 * len(rows) + 0.7)
    values = [estimate.mean * unit if (estimate := row.estimate(metric)) else 0.0 for row in rows]
    bars = axes.barh(list(map(_short, rows)), values, color=[COLOURS.get(r.arm, OTHER) for r in rows], height=0.66)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(right=max(values) * 1.14)
    return picture
