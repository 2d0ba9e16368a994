"""From runs to rows, and from rows to Markdown."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from xfactor_peft.errors import XFactorError

from .. import store
from ..store import Record
from ..tables import Table, missed, whole
from .arms import ARMS

SUMMARY, TABLE = "lowmem.json", "table.md"
WARM_UP = 2
TITLE = "GPT-2 Medium's shape, random weights, B4 × T64, LoRA r = 8 on attention and MLP"


def summarise(runs: dict[str, list[Record]]) -> list[Record]:
    """One row an arm: peaks are the largest of its runs, times the median over all their steps but the first two."""
    rows: dict[str, Record] = {}
    for arm in (arm for arm in ARMS if runs.get(arm.name)):
        row: Record = {key: getattr(arm, key) for key in ("name", "stack", "most_mib", "most_ratio", "against")}
        if done := [run for run in runs[arm.name] if "error" not in run]:
            row["load_mib"], row["train_mib"] = (max(run[key] for run in done) for key in ("load_peak", "train_peak"))
            row["peak_mib"] = max(row["load_mib"], row["train_mib"])
            row["seconds"] = median(s for run in done for s in run["seconds"][WARM_UP:])
        else:
            row["error"] = runs[arm.name][-1]["error"]
        rows[arm.name] = row
    for row in rows.values():
        times = row.get("seconds"), rows.get(row["against"] or "", {}).get("seconds")
        row["ratio"] = times[0] / times[1] if all(times) else None
    return list(rows.values())


def render(record: Record) -> str:
    """The table, with every wanted figure beside the measured one, and how it was measured."""
    lines = []
    for row in record["rows"]:
        if "error" in row:
            lines.append([row["name"], f"failed: {row['error']}", "", "", ""])
            continue
        peak = missed(row["peak_mib"], row["most_mib"], whole)
        ratio = "" if row["ratio"] is None else missed(row["ratio"], row["most_ratio"], "{:.2f}".format)
        lines.append([row["name"], peak, whole(row["load_mib"]), f"{row['seconds']:.3f}", ratio])
    table = Table([TITLE, "peak, MiB", "at load", "s/step or s/token", "× plain"], lines)
    hardware = f"{record['hardware']['cpu']}, {record['hardware']['cores']} cores"
    parity = ", ".join(f"{name} {value:.2%}" for name, value in record["parity"].items())
    return (
        f"{table.markdown(aligned=False)}\n\nLargest difference of the loss from plain fp32 LoRA: {parity}. "
        f"{hardware}; medians over {record['rounds']} runs of each arm in turn, every run a process of its own; peak "
        "is VmHWM.\n"
    )


def write(folder: Path) -> str:
    """Write the table of the results in `folder` beside them; returns it.

    Raises:
        XFactorError: there are none.
    """
    record = store.read(folder / SUMMARY)
    if record is None:
        raise XFactorError(f"there is no {folder / SUMMARY}; run benchmarks/memory.py")
    return store.write_text(folder / TABLE, render(record))
