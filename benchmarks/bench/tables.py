"""Tables, as rows of text: Markdown for the README and table.md, cells for report.html."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .results import Results, Row, steps_to_rate
from .stats import Estimate

NONE = "–"
SOURCE_TABLE = "source-"
"""How names of the source's tables begin; there is one a model."""


@dataclass(frozen=True)
class Table:
    """A caption, headers, and rows of cells; `failed` are the indices of rows that have no result."""

    caption: str
    headers: list[str]
    rows: list[list[str]]
    failed: frozenset[int] = frozenset()

    def markdown(self) -> str:
        lines = [self.headers, ["---"] + ["---:"] * (len(self.headers) - 1), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


Column = tuple[str, Callable[[Results, Row], str]]


def number(value: float) -> str:
    """Three significant digits without exponents where they are not needed."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    size = abs(value)
    if size < 5e-4:
        return "0.000"  # not "-0.000"
    if size >= 1e6:
        return f"{value:.2g}"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def with_interval(estimate: Estimate | None, low: float = float("-inf"), high: float = float("inf")) -> str:
    """ "0.931 (0.902–0.955)", clipped to what is possible; without a spread only the mean."""
    if estimate is None:
        return NONE
    if estimate.low == estimate.high:
        return number(estimate.mean)
    centre, span = number(estimate.mean), f"{number(max(low, estimate.low))}–{number(min(high, estimate.high))}"
    return centre if span == f"{centre}–{centre}" else f"{centre} ({span})"


def _mean(metric: str, show: Callable[[float], str] = number) -> Callable[[Results, Row], str]:
    def cell(results: Results, row: Row) -> str:
        estimate = row.estimate(metric)
        return NONE if estimate is None else show(estimate.mean)

    return cell


def _interval(metric: str, low: float = 0.0, high: float = float("inf")) -> Callable[[Results, Row], str]:
    return lambda results, row: with_interval(row.estimate(metric), low, high)


def size(count: float) -> str:
    """Bytes as kB or MB."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _loss(results: Results, row: Row) -> str:
    first, last = row.estimate("loss_first"), row.estimate("loss_last")
    return NONE if first is None or last is None else f"{number(first.mean)} → {number(last.mean)}"


def _floor(results: Results, row: Row) -> str:
    floor = results.floor(row) if row.arm.method != "none" else None
    return NONE if floor is None else number(floor)


def _steps(results: Results, row: Row) -> str:
    if not row.good or not row.settings["probe_every"] or row.arm.method == "none":
        return NONE
    found = [steps_to_rate(record) for record in row.good]
    reached = [step for step in found if step is not None]
    if not reached:
        return f"> {row.settings['steps']}"
    some = f" ({len(reached)} of {len(found)} seeds)" if len(reached) < len(found) else ""
    return f"{median(reached):.0f}{some}"


def _rate_used(results: Results, row: Row) -> str:
    found = {record["spec"]["lr"] for record in row.good} - {None}
    return ", ".join(f"{rate:g}" for rate in sorted(found)) or NONE


TEXT: list[Column] = [
    ("R (95 %)", _interval("rate", 0, 1)),
    ("mass on set", _mean("set_mass")),
    ("loss, first → last", _loss),
    ("floor", _floor),
    ("KL from base, nats/token", _interval("kl")),
    ("perplexity under base", _mean("perplexity")),
    ("distinct-2", _mean("distinct_2")),
    ("forgetting ×", _mean("forgetting")),
    ("steps to R ≥ 0.9", _steps),
    ("lr", _rate_used),
    ("seeds", lambda results, row: str(len(row.good))),
]
COST: list[Column] = [
    ("trainable", _mean("trainable", lambda value: f"{value:,.0f}")),
    ("file", _mean("file_bytes", size)),
    ("load peak, MiB", _mean("load_peak", lambda value: f"{value:,.0f}")),
    ("train peak, MiB", _mean("train_peak", lambda value: f"{value:,.0f}")),
    ("s/step", _mean("step_seconds")),
    ("tokens/s", _mean("tokens_per_second", lambda value: f"{value:,.0f}")),
]
SOURCE: list[Column] = [
    ("loss, first → last", _loss), ("floor", _floor), ("R (95 %)", _interval("rate", 0, 1)),
    ("R of the source's sample", lambda results, row: number(row.good[0]["samples"][0]["rate"])),
    ("KL from base, nats/token", _interval("kl")), ("distinct-2", _mean("distinct_2")),
    ("forgetting ×", _mean("forgetting")), ("s/step", _mean("step_seconds")),
]  # fmt: skip


def table(results: Results, rows: list[Row], columns: list[Column], caption: str) -> Table:
    """One line a row; an arm without any result says why in its first cell."""
    lines, failed = [], set()
    for index, row in enumerate(rows):
        if row.good:
            partly = f" [{len(row.failures)} failed: {row.failures[0]['error']}]" if row.failures else ""
            lines.append([row.label + partly, *(show(results, row) for _, show in columns)])
        else:
            failed.add(index)
            reason = f"{row.failures[0]['status']}: {row.failures[0]['error']}"
            lines.append([row.label, reason, *[""] * (len(columns) - 1)])
    return Table(caption, ["arm", *(name for name, _ in columns)], lines, frozenset(failed))


def all_tables(results: Results) -> dict[str, Table]:
    """Every table that there are rows for: text, cost, source tables by model, shape."""
    main = results.of("base") + results.of("train")
    found: dict[str, Table] = {}
    if main:
        model, settings = main[0].model, main[0].settings
        found["text"] = table(results, main, TEXT, f"Text of {model_name(model)} after training. {_settings(settings)}")
        found["cost"] = table(results, results.of("train"), COST, f"Cost on {model_name(model)}.")
    for model in dict.fromkeys(row.model for row in results.of("source")):
        rows = results.of("source", model=model)
        caption = f"The source’s rates on {model_name(model)}. {_settings(rows[0].settings)}"
        found[f"{SOURCE_TABLE}{len(found)}"] = table(results, rows, SOURCE, caption)
    shape = results.of("shape")
    if shape:
        name, settings = model_name(shape[0].model), shape[0].settings
        caption = (
            f"Memory and time at the shape of {name}, with random weights: no value of a weight enters either. "
            f"{settings['steps']} steps of {settings['batch_size']} × {settings['seq_len']} tokens."
        )
        found["shape"] = table(results, shape, COST, caption)
    return found


def sweep_table(results: Results) -> Table | None:
    """Final loss at every learning rate that was tried."""
    rows = results.of("sweep")
    if not rows:
        return None
    lines, failed = [], set()
    for index, row in enumerate(rows):
        if not row.good:
            failed.add(index)
            lines.append([row.label, f"{row.failures[0]['status']}: {row.failures[0]['error']}", ""])
            continue
        tried, chosen = row.good[0]["tried"], row.good[0]["lr"]
        text = ", ".join(f"{t['lr']:g}: {NONE if t['loss'] is None else number(t['loss'])}" for t in tried)
        lines.append([row.label, text, f"{chosen:g}"])
    caption = f"Learning rates: loss after {rows[0].settings['steps']} steps on seed 0; the lowest is taken."
    return Table(caption, ["arm", "lr: loss", "chosen"], lines, frozenset(failed))


def model_name(model: str) -> str:
    """A model's name for people; one with random weights is called by its shape."""
    names = {"demo": "the bundled demo model", "gpt2-medium": "GPT-2 Medium", "tiny-random": "a tiny random model"}
    plain = Path(model).name.removesuffix("-shape")
    return names.get(plain, plain)


def _settings(settings: dict[str, Any]) -> str:
    samples = settings["prompts"] * settings["repeats"]
    return (
        f"{settings['steps']} steps of {settings['batch_size']} × {settings['seq_len']} random tokens towards tokens "
        f"with “{settings['contains']}”; R over {samples} samples of {settings['new_tokens']} tokens a seed, "
        "temperature 1, no top-k, no top-p, special tokens banned."
    )


def provenance_line(results: Results) -> str:
    """Machine, versions, commit and date of the benchmark, in one line."""
    manifest, hardware = results.manifest, results.checks["hardware"]
    versions = manifest["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    threads = f"{hardware['threads']} thread{'s' if hardware['threads'] > 1 else ''}"
    place = hardware["gpu"] or f"{hardware['cpu']}, {threads}"
    return f"{place}; {packages}; commit {', '.join(results.commits())}; {manifest['created'][:10]}"


def markdown(results: Results) -> str:
    """All tables, for table.md."""
    tables = [*all_tables(results).values(), sweep_table(results)]
    parts = [f"{table.caption}\n\n{table.markdown()}" for table in tables if table]
    return "\n\n".join([*parts, provenance_line(results)]) + "\n"
