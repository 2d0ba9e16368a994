"""Tables and the plot of R against KL, from the records of `rate.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from xfactor_peft.errors import XFactorError

from .. import store
from ..store import Record
from ..tables import NONE, Table
from . import bound
from .curve import Curve

TABLE, BIAS_TABLE, PLOT = "table.md", "logit-bias.md", "rate-kl.png"
LABELS = {
    "tilt": "tilted, set head", "sequence-w1": "sequence-level", "sequence": "sequence-level, no price",
    "suppress": "tilted, R = 0",
    "blocks-r1": "tilted, attention/MLP r=1", "blocks-r4": "tilted, attention/MLP r=4",
    "blocks-r16": "tilted, attention/MLP r=16", "uniform-lora": "uniform, LoRA r=8", "uniform-full": "uniform, full",
    "trl": "GRPO (trl)",
}  # fmt: skip
HEADERS = ["arm", "wanted R", "seeds", "sampled R", "largest error", "KL, nats/token", "× logit bias", "outside KL",
           "spread", "distinct-2", "perplexity", "training, CPU s"]  # fmt: skip
TICKS = (0.005, 0.02, 0.05, 0.1, 0.3, 0.6, 0.9, 0.99)

Groups = dict[tuple[str, float], list[Record]]


def load(folder: Path) -> tuple[Curve, Groups]:
    """The logit bias, and the other records by arm and wanted rate, in the table's order.

    Raises:
        XFactorError: the logit bias, which every arm is compared with, was not measured.
    """
    groups: Groups = defaultdict(list)
    for record in store.read_all(folder):
        spec = record.get("spec", record)  # older records have their settings beside the figures
        groups[spec["arm"], spec["wanted"]].append(record)
    biases = [record for record in groups.pop(("bias", 0.0), ()) if record["status"] == "ok"]
    if not biases:
        raise XFactorError("no result of the arm `bias`, which every other one is compared with; run it first")
    order = {arm: index for index, arm in enumerate(LABELS)}
    return Curve(biases), dict(sorted(groups.items(), key=lambda item: (order.get(item[0][0], 99), item[0][1])))


def report(folder: Path) -> str:
    """Write table.md, logit-bias.md and rate-kl.png into `folder`; returns the tables."""
    curve, groups = load(folder)
    seeds = len(list(folder.glob("bias-0-seed*.json")))
    lines = [
        [f"{p['strength']:g}", str(seeds), *(f"{p[key]:.4f}" for key in ("rate", "set_mass", "kl_from_base"))]
        for p in curve.points
    ]
    bias = Table(["logit bias", "seeds", "sampled R", "set mass", "KL, nats/token"], lines).markdown(aligned=False)
    arms = Table(HEADERS, [row(*key, group, curve) for key, group in groups.items()]).markdown(aligned=False)
    pages = {TABLE: arms + "\n", BIAS_TABLE: bias + "\n"}
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    plot(folder / PLOT, curve, groups)
    if (folder / "bound").is_dir():
        pages["bound"] = bound.write(folder)
    return "\n".join(pages.values())


def row(arm: str, wanted: float, records: Sequence[Record], curve: Curve) -> list[str]:
    label, good = LABELS.get(arm, arm), [r for r in records if r["status"] == "ok"]
    if not good:
        return [label, f"{wanted:g}", f"failed: {records[0]['error']}", *[""] * (len(HEADERS) - 3)]
    scores, cpu = [r["after"] for r in good], [r["cpu"] for r in good if "cpu" in r]
    rates, has_rate = [s["rate"] for s in scores], not arm.startswith("uniform")
    outside = abs(mean(s["kl_parts"]["outside_conditional"] for s in scores))  # rounding around 0 may be negative

    def average(name: str, digits: int) -> str:
        return f"{mean(s[name] for s in scores):.{digits}f}"

    return [
        label,
        f"{wanted:g}" if has_rate else NONE,
        str(len(good)),
        " ".join(f"{rate:.4f}" for rate in rates),
        f"{max(abs(rate - wanted) for rate in rates):.4f}" if has_rate else "",
        average("kl_from_base", 4),
        over_bias(scores, curve),
        f"{outside:.4f}",
        average("spread", 3),
        average("distinct_2", 3),
        average("perplexity", 0),
        f"{mean(cpu):.0f}" if cpu else NONE,
    ]


def over_bias(scores: list[Record], curve: Curve) -> str:
    """KL over the logit bias's at the same set mass: the mean of the runs, and the outer ends of their intervals."""
    pairs = [(score, kl) for score in scores if (kl := curve.kl(score["set_mass"]))]
    if not pairs:
        return NONE
    low, high = min(s["kl_interval"][0] / kl for s, kl in pairs), max(s["kl_interval"][1] / kl for s, kl in pairs)
    return f"{mean(s['kl_from_base'] / kl for s, kl in pairs):.3f} ({low:.3f}–{high:.3f})"


def plot(file: Path, curve: Curve, groups: Groups) -> None:
    """R (logit scale) against KL (log scale): the logit-bias curve, and every run as a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5))
    used = [(p["set_mass"], p["kl_from_base"]) for p in curve.points if p["strength"] > 0]
    axes.plot(*zip(*used, strict=True), "k-", lw=1.2, label="exact logit bias")
    axes.axvline(curve.points[0]["set_mass"], color="0.7", lw=1, ls=":", label="base")
    markers = iter("osD^v<>Pp*")
    for arm, label in LABELS.items():
        scores = [r["after"] for key, group in groups.items() if key[0] == arm for r in group if r["status"] == "ok"]
        points = [(s["set_mass"], s["kl_from_base"], *s["kl_interval"]) for s in scores]
        points = [point for point in points if min(point[:2]) > 1e-4]
        if points:
            x, y, low, high = zip(*points, strict=True)
            bars = [[k - end for k, end in zip(y, low, strict=True)], [end - k for k, end in zip(y, high, strict=True)]]
            axes.errorbar(x, y, yerr=bars, fmt=next(markers), ms=5, lw=0.8, alpha=0.8, label=label)
    axes.set_xscale("logit")
    axes.set_yscale("log")
    axes.set_xticks(TICKS, [f"{t:g}" for t in TICKS])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("R, expected share of set tokens in the model's own samples")
    axes.set_ylabel("KL(model || base), nats per token")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
