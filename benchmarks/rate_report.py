"""Tables and the plot of R against KL, from the JSON files of `rate.py`."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np

LABELS = {
    "tilt": "tilted, set head", "sequence": "sequence-level", "suppress": "tilted, R = 0",
    "blocks-r1": "tilted, attention/MLP r=1", "blocks-r4": "tilted, attention/MLP r=4",
    "blocks-r16": "tilted, attention/MLP r=16", "uniform-lora": "uniform, LoRA r=8", "uniform-full": "uniform, full",
    "trl": "GRPO (trl)",
}  # fmt: skip


class Curve:
    """KL of the exact logit bias against set mass, pooled over seeds.

    Between the measured strengths only slow functions of lambda are interpolated: log-odds of the mass less lambda, and
    KL over the KL of one context with the base's mean mass. For contexts that are all alike both would be constant.
    """

    def __init__(self, records: list[dict]) -> None:
        points: dict[float, list[dict]] = defaultdict(list)
        for record in records:
            for point in record["points"]:
                points[point["strength"]].append(point)
        self.points = [
            {key: mean(p[key] for p in group) for key in ("strength", "rate", "set_mass", "kl_from_base")}
            for _, group in sorted(points.items())
        ]
        self._base = self.points[0]["set_mass"]
        used = self.points[1:]
        strengths = np.array([p["strength"] for p in used])
        odds = np.array([math.log(p["set_mass"] / (1 - p["set_mass"])) for p in used])
        slow = np.array([p["kl_from_base"] for p in used]) / self._alike(strengths)
        self._strength = np.linspace(strengths[0], strengths[-1], 2001)
        self._odds = self._strength + np.interp(self._strength, strengths, odds - strengths)
        self._kl = self._alike(self._strength) * np.interp(self._strength, strengths, slow)

    def _alike(self, strength: np.ndarray) -> np.ndarray:
        m = self._base
        q = m * np.exp(strength) / (1 - m + m * np.exp(strength))
        return q * np.log(q / m) + (1 - q) * np.log((1 - q) / (1 - m))

    def kl(self, mass: float) -> float | None:
        """KL at a set mass inside the measured range, else None."""
        odds = math.log(mass / (1 - mass)) if 0 < mass < 1 else math.inf
        if not self._odds[0] <= odds <= self._odds[-1]:
            return None
        return float(np.interp(odds, self._odds, self._kl))


def load(folder: Path) -> list[dict]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def report(folder: Path) -> None:
    """Write table.md, logit-bias.md and rate-kl.png into `folder`."""
    records = load(folder)
    biases = [r for r in records if r["arm"] == "bias" and r["status"] == "ok"]
    if not biases:
        raise SystemExit("no result of the arm `bias`, which every other one is compared with; run it first")
    curve = Curve(biases)
    groups: dict[tuple[str, float], list[dict]] = defaultdict(list)
    for record in records:
        if record["arm"] != "bias":
            groups[record["arm"], record["wanted"]].append(record)
    order = {arm: index for index, arm in enumerate(LABELS)}
    keys = sorted(groups, key=lambda key: (order.get(key[0], 99), key[1]))
    lines = [
        "| arm | wanted R | seeds | sampled R | largest error | KL, nats/token | × logit bias | outside KL | spread | "
        "distinct-2 | perplexity | training, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(key, groups[key], curve) for key in keys),
    ]
    bias = [
        "| logit bias | seeds | sampled R | set mass | KL, nats/token |",
        "|---|---|---|---|---|",
        *(
            f"| {p['strength']:g} | {len(biases)} | {p['rate']:.4f} | {p['set_mass']:.4f} | {p['kl_from_base']:.4f} |"
            for p in curve.points
        ),
    ]
    for name, part in (("table.md", lines), ("logit-bias.md", bias)):
        text = "\n".join(part) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
        print(text)
    plot(folder / "rate-kl.png", curve, groups)


def ratios(records: list[dict], curve: Curve) -> list[tuple[float, float, float]]:
    """(ratio, low, high) of every run: its KL and interval over the curve's KL at its own set mass."""
    found = []
    for record in records:
        kl = curve.kl(record["after"]["set_mass"])
        if kl:
            low, high = record["after"]["kl_interval"]
            found.append((record["after"]["kl_from_base"] / kl, low / kl, high / kl))
    return found


def row(key: tuple[str, float], records: list[dict], curve: Curve) -> str:
    arm, wanted = key
    good = [r for r in records if r["status"] == "ok"]
    if not good:
        return f"| {LABELS.get(arm, arm)} | {wanted:g} | failed: {records[0]['error']} | | | | | | | | | |"
    scores = [r["after"] for r in good]
    rates = [s["rate"] for s in scores]
    has_rate = not arm.startswith("uniform")
    error = f"{max(abs(r - wanted) for r in rates):.4f}" if has_rate else ""
    compared = ratios(good, curve)
    ratio = "–"
    if compared:
        low, high = min(low for _, low, _ in compared), max(high for _, _, high in compared)
        ratio = f"{mean(r for r, _, _ in compared):.3f} ({low:.3f}–{high:.3f})"

    def average(name: str, digits: int) -> str:
        return f"{mean(s[name] for s in scores):.{digits}f}"

    outside = abs(mean(s["kl_parts"]["outside_conditional"] for s in scores))  # rounding around 0 may be negative
    cells = [
        LABELS.get(arm, arm), f"{wanted:g}" if has_rate else "–", str(len(good)),
        " ".join(f"{r:.4f}" for r in rates), error, average("kl_from_base", 4), ratio, f"{outside:.4f}",
        average("spread", 3), average("distinct_2", 3), average("perplexity", 0),
        f"{mean(cpu):.0f}" if (cpu := [r["cpu"] for r in good if "cpu" in r]) else "–",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def plot(file: Path, curve: Curve, groups: dict[tuple[str, float], list[dict]]) -> None:
    """R (logit scale) against KL (log scale): the logit-bias curve, and every run as a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 5))
    used = [p for p in curve.points if p["strength"] > 0]
    masses, kls = [p["set_mass"] for p in used], [p["kl_from_base"] for p in used]
    axes.plot(masses, kls, "k-", lw=1.2, label="exact logit bias")
    axes.axvline(curve.points[0]["set_mass"], color="0.7", lw=1, ls=":", label="base")
    markers = iter("osD^v<>Pp")
    for arm in LABELS:
        records = [r for (name, _), group in groups.items() if name == arm for r in group if r["status"] == "ok"]
        points = [(r["after"]["set_mass"], r["after"]["kl_from_base"], r["after"]["kl_interval"]) for r in records]
        points = [p for p in points if p[0] > 1e-4 and p[1] > 1e-4]
        if points:
            x, y, intervals = zip(*points, strict=True)
            bars = [[k - low for k, (low, _) in zip(y, intervals, strict=True)],
                    [high - k for k, (_, high) in zip(y, intervals, strict=True)]]  # fmt: skip
            axes.errorbar(x, y, yerr=bars, fmt=next(markers), ms=5, lw=0.8, alpha=0.8, label=LABELS[arm])
    axes.set_xscale("logit")
    axes.set_yscale("log")
    ticks = [0.005, 0.02, 0.05, 0.1, 0.3, 0.6, 0.9, 0.99]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("R, expected share of set tokens in the model's own samples")
    axes.set_ylabel("KL(model || base), nats per token")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)
