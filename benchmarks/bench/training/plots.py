"""The figures: loss curves, what R costs, memory and time. As SVG they follow the reader's light or dark theme."""

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
from .pages import where_of
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
RATE, FORGOT, KL = "R, sampled", "forgetting ×", "KL(model || base), nats per token"


@dataclass(frozen=True)
class Figure:
    """A figure, its file's name, the report's section that shows it, and what it shows in a sentence."""

    name: str
    section: str
    caption: str
    picture: plt.Figure


def figures(results: Results) -> Iterator[Figure]:
    """Those that there are results for; each is drawn when it is asked for."""
    train, places = ([row for row in results.of(group) if row.good] for group in ("train", "places"))
    with matplotlib.rc_context(STYLE):
        for index, table in enumerate(results.tables("source")):
            rows = [row for row in table if row.good and row.arm.method != "none"]
            if rows:
                caption = (
                    f"{model_name(rows[0].model)}, “{rows[0].contains}”: loss over the steps at the source’s rates."
                )
                yield Figure("source-loss" + (f"-{index}" if index else ""), "source", caption, _source_curves(rows))
        for prefix, section, rows in (("places-", "places", places), ("", "train", train)):
            if rows:
                caption = "R against KL from the base; up and to the left is better."
                caption += " The line is an exact logit bias." if results.bias(rows[0]) else ""
                yield Figure(f"{prefix}rate-kl", section, caption, _rate_against_kl(results, rows))
                caption = "R against what was forgotten: perplexity of plain prose, after over before."
                yield Figure(
                    f"{prefix}forgetting", section, caption, _scatter(rows, ("forgetting", FORGOT), ("rate", RATE))
                )
        if train:
            caption = "Loss over the steps, mean of the seeds; the band is their range."
            yield Figure("loss", "train", caption, _loss_curves(results, train))
        for table in results.tables("shape"):
            shape, name = [row for row in table if row.good], table[0].model.removesuffix("-shape")
            if shape:
                pair, end = (("step_seconds", "seconds a step"), ("train_peak", "peak of training, MiB")), f"-{name}"
                caption = f"{where_of(shape)}: peak memory of training against the time of a step."
                yield Figure(f"memory-time{end}", "shape", caption, _scatter(shape, *pair))


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
    picture = _scatter(rows, ("kl", KL), ("rate", RATE))
    axes = picture.axes[0]
    if base := results.bias(rows[0]):
        points = [(0.0, base["scores"]["rate"]), *((p["kl_from_base"], p["rate"]) for p in base["bias"])]
        window = axes.get_xlim(), axes.get_ylim()
        axes.plot(*zip(*points, strict=True), "-", color=INK, lw=1, zorder=1)
        axes.set(xlim=window[0], ylim=window[1])
    return picture


def _scatter(rows: list[Row], across: tuple[str, str], up: tuple[str, str]) -> plt.Figure:
    """A point a row, zoomed to where they differ, and their names in a column beside them."""
    picture, axes = _new((across[1], up[1]))
    points = [(row, x.mean, y.mean) for row in rows if (x := row.estimate(across[0])) and (y := row.estimate(up[0]))]
    if max(x for _, x, _ in points) > 100 * min(x for _, x, _ in points) > 0:
        axes.set_xscale("log")
    for row, x, y in points:
        axes.plot(x, y, "o" if row.arm.method == "full" else "D", color=COLOURS.get(row.arm, OTHER), ms=5, alpha=0.85)
    axes.margins(0.08)
    ends = axes.get_ylim()
    points.sort(key=lambda point: point[2])
    for place, (row, x, y) in enumerate(points):
        at = 1.06, (place + 0.5) / len(points)
        line = {"arrowstyle": "-", "color": FAINT, "lw": 0.7, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)}
        colour = COLOURS.get(row.arm, INK)
        axes.annotate(_short(row), (x, y), at, textcoords="axes fraction", fontsize=7.5, va="center", color=colour,
                      arrowprops=line, annotation_clip=False)  # fmt: skip
    axes.set_ylim(ends)
    axes.ticklabel_format(axis="y", useOffset=False)
    return picture
