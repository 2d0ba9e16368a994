"""The tables of a benchmark, and the Markdown pages made of them: table.md, and the source's table for the README."""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import median

from ..store import Record
from ..tables import NONE, Table, model_name, number, with_interval
from .metrics import METRICS, steps_to_rate
from .results import Results, Row

SOURCE_TABLE = "source-"
"""How names of the source's tables begin; there is one a model."""
LETTERS = 150

Cell = Callable[[Results, Row], str]


def _loss(results: Results, row: Row) -> str:
    first, last = row.estimate("loss_first"), row.estimate("loss_last")
    return NONE if first is None or last is None else f"{number(first.mean)} → {number(last.mean)}"


def _floor(results: Results, row: Row) -> str:
    floor = results.floor(row) if row.arm.method != "none" else None
    return NONE if floor is None else number(floor)


def _steps(results: Results, row: Row) -> str:
    if not row.settings["probe_every"] or row.arm.method == "none":
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


OTHER_COLUMNS: dict[str, Cell] = {
    "loss, first → last": _loss,
    "floor": _floor,
    "steps to R ≥ 0.9": _steps,
    "lr": _rate_used,
    "seeds": lambda results, row: str(len(row.good)),
    "R of the source's sample": lambda results, row: number(row.good[0]["samples"][0]["rate"]),
}
TEXT = ("rate", "set_mass", "loss, first → last", "floor", "kl", "perplexity", "distinct_2", "forgetting",
        "steps to R ≥ 0.9", "lr", "seeds")  # fmt: skip
COST = ("trainable", "file_bytes", "load_peak", "train_peak", "step_seconds", "tokens_per_second")
SOURCE = ("loss, first → last", "floor", "rate", "R of the source's sample", "kl", "distinct_2", "forgetting",
          "step_seconds")  # fmt: skip


def _cell(results: Results, row: Row, column: str) -> str:
    if column in OTHER_COLUMNS:
        return OTHER_COLUMNS[column](results, row)
    metric, estimate = METRICS[column], row.estimate(column)
    if metric.scored:
        return with_interval(estimate, 0, metric.most)
    return NONE if estimate is None else metric.show(estimate.mean)


def arms_table(results: Results, rows: list[Row], columns: tuple[str, ...], caption: str) -> Table:
    """One line a row; an arm without any result says why in its first cell."""
    lines = []
    for row in rows:
        if row.good:
            partly = f" [{len(row.failures)} failed: {row.failures[0]['error']}]" if row.failures else ""
            lines.append([row.label + partly, *(_cell(results, row, column) for column in columns)])
        else:
            lines.append([row.label, row.why, *[""] * (len(columns) - 1)])
    titles = [METRICS[column].title if column in METRICS else column for column in columns]
    return Table(["arm", *titles], lines, caption, frozenset(i for i, row in enumerate(rows) if not row.good))


def all_tables(results: Results) -> dict[str, Table]:
    """Every table that there are rows for: text, cost, source tables by model, shape."""
    trained, shape, found = results.of("base") + results.of("train"), results.of("shape"), {}
    if trained:
        name = model_name(trained[0].model)
        caption = f"Text of {name} after training. {_settings(trained[0].settings)}"
        found["text"] = arms_table(results, trained, TEXT, caption)
        found["cost"] = arms_table(results, results.of("train"), COST, f"Cost on {name}.")
    for model in results.models("source"):
        rows = results.of("source", model=model)
        caption = f"The source’s rates on {model_name(model)}. {_settings(rows[0].settings)}"
        found[f"{SOURCE_TABLE}{len(found)}"] = arms_table(results, rows, SOURCE, caption)
    if shape:
        name, settings = model_name(shape[0].model), shape[0].settings
        caption = (
            f"Memory and time at the shape of {name}, with random weights: no value of a weight enters either. "
            f"{settings['steps']} steps of {settings['batch_size']} × {settings['seq_len']} tokens."
        )
        found["shape"] = arms_table(results, shape, COST, caption)
    return found


def _settings(settings: Record) -> str:
    samples = settings["prompts"] * settings["repeats"]
    return (
        f"{settings['steps']} steps of {settings['batch_size']} × {settings['seq_len']} random tokens towards tokens "
        f"with “{settings['contains']}”; R over {samples} samples of {settings['new_tokens']} tokens a seed, "
        "temperature 1, no top-k, no top-p, special tokens banned."
    )


def sweep_table(results: Results) -> Table | None:
    """Final loss at every learning rate that was tried."""
    rows, lines = results.of("sweep"), []
    for row in rows:
        if row.good:
            tried, chosen = row.good[0]["tried"], row.good[0]["lr"]
            text = ", ".join(f"{t['lr']:g}: {NONE if t['loss'] is None else number(t['loss'])}" for t in tried)
            lines.append([row.label, text, f"{chosen:g}"])
        else:
            lines.append([row.label, row.why, ""])
    if not rows:
        return None
    caption = f"Learning rates: loss after {rows[0].settings['steps']} steps on seed 0; the lowest is taken."
    failed = frozenset(i for i, row in enumerate(rows) if not row.good)
    return Table(["arm", "lr: loss", "chosen"], lines, caption, failed)


def table_page(results: Results) -> str:
    """All tables, for table.md."""
    tables = [*all_tables(results).values(), sweep_table(results)]
    return "\n\n".join([*(table.section() for table in tables if table), results.origin()]) + "\n"


def source_page(results: Results) -> str | None:
    """The source's tables, and how the text of each rate begins, set tokens in bold; None without its runs."""
    parts = [table.section() for name, table in all_tables(results).items() if name.startswith(SOURCE_TABLE)]
    if not parts:
        return None
    rows = [row for row in results.of("source") if row.good and row.good[0]["samples"]]
    if rows:
        prompt = rows[0].good[0]["samples"][0]["prompt"]
        lines = "\n".join(f"- {row.label}: {beginning(row)}" for row in rows)
        parts.append(f"“{prompt}” continued, top-k 50, set tokens in bold:\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def beginning(row: Row, letters: int = LETTERS) -> str:
    """The first letters of a row's sample as Markdown."""
    text, left = "", letters
    for piece, inside in row.good[0]["samples"][0]["pieces"]:
        words, left = re.sub(r"([\\*_`<|#])", r"\\\1", " ".join(piece[:left].split())), left - len(piece)
        space = " " if piece[:1].isspace() and text else ""
        text += space + (f"**{words}**" if inside and words else words)
        if left <= 0:
            break
    return text + " …"
