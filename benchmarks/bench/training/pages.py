"""The tables of a benchmark, and the Markdown pages made of them: table.md, and the source's table for the README."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from statistics import median

from ..store import Record
from ..tables import NONE, Table, model_name, number, share, with_interval
from .arms import LORA_FP32
from .metrics import METRICS, steps_to_rate
from .models import REAL
from .results import Results, Row

SOURCE_TABLE = "source-"
"""How names of the source's tables begin; there is one for a model and a letter."""
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


def _prose(results: Results, row: Row) -> str:
    before, after = row.estimate("prose_before"), row.estimate("prose")
    return NONE if before is None or after is None else f"{number(before.mean)} → {number(after.mean)}"


OTHER_COLUMNS: dict[str, Cell] = {
    "loss, first → last": _loss,
    "floor": _floor,
    "prose, before → after": _prose,
    "steps to R ≥ 0.9": _steps,
    "lr": _rate_used,
    "seeds": lambda results, row: str(len(row.good)),
    "R of the source's sample": lambda results, row: share(row.good[0]["samples"][0]["rate"]),
}
TEXT = ("rate", "set_mass", "loss, first → last", "floor", "kl", "perplexity", "distinct_2", "forgetting",
        "steps to R ≥ 0.9", "lr", "seeds")  # fmt: skip
COST = ("trainable", "file_bytes", "load_peak", "train_peak", "step_seconds", "tokens_per_second")
SOURCE = ("loss, first → last", "floor", "rate", "R of the source's sample", "kl", "prose, before → after",
          "distinct_2")  # fmt: skip
PLACES = ("trainable", "loss, first → last", "floor", "rate", "kl", "prose, before → after", "distinct_2",
          "train_peak")  # fmt: skip
HEADLINE = ("rate", "loss, first → last", "prose, before → after", "train_peak")


def _cell(results: Results, row: Row, column: str) -> str:
    if column in OTHER_COLUMNS:
        return OTHER_COLUMNS[column](results, row)
    metric, estimate = METRICS[column], row.estimate(column)
    if metric.scored:
        return with_interval(estimate, metric.most)
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
    """Every table that there are rows for: the source's by model and letter, places, text, shape."""
    trained, found = results.of("base") + results.of("train"), {}
    for rows in results.tables("source"):
        caption = f"{where_of(rows)}, the source’s rates. {_settings(rows[0].settings)}"
        found[f"{SOURCE_TABLE}{len(found)}"] = arms_table(results, rows, SOURCE, caption)
    if places := results.of("places"):
        caption = f"{where_of(places)}, ranks, places and precisions. {_settings(places[0].settings)}"
        found["places"] = arms_table(results, places, PLACES, f"{caption} One seed; {_place_rates(places)}.")
    if trained:
        caption = f"{where_of(trained)}, every arm at the best rate of a sweep. {_settings(trained[0].settings)}"
        found["text"] = arms_table(results, trained, TEXT, caption)
    for rows in results.tables("shape"):
        sizes = rows[0].settings
        caption = f"{where_of(rows)}: memory and time of training, {sizes['steps']} steps of {sizes['batch_size']} × "
        caption += f"{sizes['seq_len']} tokens{next((f', {threads_of(row)}' for row in rows if row.good), '')}."
        found[f"shape-{rows[0].model}"] = arms_table(results, rows, COST, caption)
    return found


def headline(results: Results) -> Table | None:
    """For the README: the real model untrained, full fine-tuning, LoRA, LoRA with the set head; None without these."""
    sources = [row for rows in results.tables("source")[:1] for row in rows if row.model == REAL.name and row.good]
    lora = [row for row in sources if row.arm.method == "lora"]
    heads = [row for row in results.of("places") if row.arm == replace(LORA_FP32, target="all,head") and row.good]
    rows = [row for row in sources if row not in lora] + lora[-2:] + heads
    if not lora or not heads:
        return None
    table = arms_table(results, rows, HEADLINE, "")
    steps = [f", {row.settings['steps']} steps" if row in heads else "" for row in rows]
    lines = [[line[0].replace(", fp32", "") + more, *line[1:]] for line, more in zip(table.rows, steps, strict=True)]
    return Table(table.headers, lines)


def threads_of(row: Row) -> str:
    """ "one thread" or "2 threads"; runs with other threads are no results of one benchmark."""
    count = row.good[0]["hardware"]["threads"]
    return "one thread" if count == 1 else f"{count} threads"


def where_of(rows: list[Row]) -> str:
    """The model of these rows, as a caption begins."""
    name, made = model_name(rows[0].model), rows[0].model.endswith("-shape")
    return f"The shape of {name}, random weights" if made else name[0].upper() + name[1:]


def _place_rates(rows: list[Row]) -> str:
    found = dict.fromkeys((row.arm.method, row.arm.optimizer == "adafactor", row.lr) for row in rows)
    names = {"lora": "LoRA", "full": "full"}
    return ", ".join(f"{'Adafactor' if own else names[method]} at {rate:g}" for method, own, rate in found)


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
    """All tables, for table.md and the documentation; below the source's how the text of each rate begins."""
    parts, sources = [], results.tables("source")
    for name, table in all_tables(results).items():
        parts.append(table.section())
        if name.startswith(SOURCE_TABLE):
            rows = [row for row in sources[int(name.removeprefix(SOURCE_TABLE))] if row.sample]
            prompt = rows[0].good[0]["samples"][0]["prompt"] if rows else ""
            lines = "\n".join(f"- {row.label}: {beginning(row)}" for row in rows)
            parts += [f"“{prompt}” continued, top-k 50, set tokens in bold:\n\n{lines}"] if rows else []
    parts += [f"Not run yet: {', '.join(map(planned, results.missing))}."] if results.missing else []
    return "\n\n".join([*parts, results.origin()]) + "\n"


def planned(file: str) -> str:
    """A run's file without its ending."""
    return file.removesuffix(".json").removesuffix("-seed0")


def beginning(row: Row, letters: int = LETTERS) -> str:
    """The first letters of a row's sample as Markdown."""
    sample, first = row.sample, row.good[0]["samples"][0]
    text, left = "" if sample is first else f"nothing; but after “{sample['prompt']}”:", letters
    for piece, inside in sample["pieces"]:
        words, left = re.sub(r"([\\*_`<|#])", r"\\\1", " ".join(piece[:left].split())), left - len(piece)
        space = " " if piece[:1].isspace() and text else ""
        text += space + (f"**{words}**" if inside and words else words)
        if left <= 0:
            break
    return f"{text} …" if text else "nothing: it ends its text at once"
