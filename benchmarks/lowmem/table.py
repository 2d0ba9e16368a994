"""From runs to rows, and from rows to Markdown."""

from __future__ import annotations

from statistics import median

from .arms import ARMS

WARM_UP = 2


def summarise(runs: dict[str, list[dict]]) -> list[dict]:
    """One row an arm: peaks are the largest of its runs, times the median over all their steps but the first two."""
    rows = []
    for arm in ARMS:
        done = [run for run in runs.get(arm.name, ()) if "error" not in run]
        row: dict = {"name": arm.name, "stack": arm.stack, "most_mib": arm.most_mib, "most_ratio": arm.most_ratio}
        if done:
            row["load_mib"] = max(run["load_peak"] for run in done)
            row["train_mib"] = max(run["train_peak"] for run in done)
            row["peak_mib"] = max(row["load_mib"], row["train_mib"])
            row["seconds"] = median(s for run in done for s in run["seconds"][WARM_UP:])
            row["seconds_of_runs"] = [median(run["seconds"][WARM_UP:]) for run in done]
        elif runs.get(arm.name):
            row["error"] = runs[arm.name][-1]["error"]
        else:
            continue
        row["against"] = arm.against
        rows.append(row)
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        other = by_name.get(row["against"] or "", {})
        row["ratio"] = row["seconds"] / other["seconds"] if "seconds" in row and "seconds" in other else None
    return rows


def render(record: dict) -> str:
    """The table, with every wanted figure beside the measured one."""
    lines = [
        "| GPT-2 Medium's shape, random weights, B4 × T64, LoRA r = 8 on attention and MLP | peak, MiB | at load "
        "| s/step or s/token | × plain |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if "error" in row:
            lines.append(f"| {row['name']} | failed: {row['error']} | | | |")
            continue
        peak = _against(row["peak_mib"], row["most_mib"], "{:,.0f}")
        ratio = "" if row["ratio"] is None else _against(row["ratio"], row["most_ratio"], "{:.2f}")
        lines.append(f"| {row['name']} | {peak} | {row['load_mib']:,.0f} | {row['seconds']:.3f} | {ratio} |")
    hardware = f"{record['hardware']['cpu']}, {record['hardware']['cores']} cores"
    parity = ", ".join(f"{name} {value:.2%}" for name, value in record["parity"].items())
    lines += [
        "",
        f"Largest difference of the loss from plain fp32 LoRA: {parity}. {hardware}; medians over "
        f"{record['rounds']} runs of each arm in turn, every run a process of its own; peak is VmHWM.",
    ]
    return "\n".join(lines) + "\n"


def _against(value: float, most: float | None, form: str) -> str:
    """The value, and the one wanted where it was missed."""
    text = form.format(value)
    return text if most is None or value <= most else f"{text} (wanted ≤ {form.format(most)})"
