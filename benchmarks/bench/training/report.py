"""report.html: one file that opens from disk, with figures, tables and samples in it and nothing to fetch."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..store import Record
from ..tables import file_size, model_name, number, share
from . import arms, plots
from .pages import all_tables, headline, planned, sweep_table, table_page, threads_of, where_of
from .results import Results, Row, load

TEMPLATE = "report.html.j2"
REPORT, TABLE, HEADLINE, PLOTS = "report.html", "table.md", "headline.md", "plots"
LETTERS, SAME = 420, 40
"""A sample is shown so far, and left out where its beginning is that of one shown before."""
PLACES_SHOWN = 9
LIKE = (arms.LORA_BF16, arms.FULL_BF16), (arms.LORA_FP32, arms.FULL), (arms.LORA_INT8, arms.FULL)
"""What is compared in memory and time: the first of these pairs that there is."""


def write_report(folder: Path) -> str:
    """Write table.md, plots/*.png and report.html into `folder`; returns what was written, for people.

    Raises:
        XFactorError: the correctness checks have not passed.
    """
    results = load(folder)
    (folder / TABLE).write_text(table_page(results), encoding="utf-8")
    if table := headline(results):
        (folder / HEADLINE).write_text(table.markdown() + "\n", encoding="utf-8")
    pictures = plots.save_png(results, folder / PLOTS)
    (folder / REPORT).write_text(html(results), encoding="utf-8")
    failures = sum(len(row.failures) for row in results.rows)
    lines = [f"{folder / TABLE}", f"{folder / PLOTS}: {len(pictures)} figures", f"{folder / REPORT}"]
    return "\n".join(lines + ([f"{failures} runs failed; their rows say why"] if failures else []))


def html(results: Results) -> str:
    """The page as text."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "size": file_size, "name": model_name, "share": share}
    shown = [
        row for row in results.of("places") if row.arm.target != "all" or row.arm.r != 8 or row.arm == arms.FULL_BF16
    ]
    return environment.get_template(TEMPLATE).render(
        results=results,
        cards=cards(results),
        figures=_figures(results),
        tables=all_tables(results),
        sources=[(rows[0], where_of(rows), samples(rows)) for rows in results.tables("source")],
        sweep=sweep_table(results),
        samples={"places": samples(shown)[:PLACES_SHOWN], "text": samples(results.of("base") + results.of("train"))},
        failures=[(row, record) for row in results.rows for record in row.failures],
        planned=[planned(file) for file in results.missing],
        provenance=results.origin(),
        project=_project(results.folder),
    )


@dataclass(frozen=True)
class Card:
    """A question, the two answers, and what they are of."""

    question: str
    lora: str
    full: str
    note: str


def cards(results: Results) -> list[Card]:
    """One a question, like with like: the best rate of each, or arms of the same precision."""
    pairs = [*map(best_pair, results.tables("source")), like(results.of("places")), like(results.of("train"))]
    found: list[Card] = []
    if text := next(filter(None, pairs), None):
        where = f"{model_name(text[0].model)}, “{text[0].contains}”, {text[0].settings['steps']} steps; LoRA at "
        where += f"{_rate(text[0])}, full at {_rate(text[1])}"
        floor, note = results.floor(text[0]), "KL(target ‖ model), nats, at the end"
        note += "" if floor is None else f"; a frozen head lets no adapter below {number(floor)}"
        prose = text[1].estimate("prose_before")
        found += [
            _card("How much of what it writes is in the set?", text, "rate", share, f"R. {where}"),
            _card("How near the target does it get?", text, "loss_last", number, note),
            _card("What does it forget?", text, "prose", number,
                  f"perplexity of plain prose, {number(prose.mean)} before: how many words the next one could be"),
        ]  # fmt: skip
    if pair := like([row for row in results.of("shape") if row.model.endswith("-shape")]):
        where = f"{pair[0].arm.precision}, at the shape of {model_name(pair[0].model)}, {threads_of(pair[0])}"
        units = ("train_peak", lambda mib: f"{mib / 1024:.2f} GiB"), ("step_seconds", lambda s: f"{s:.2f} s")
        questions = "How much memory does training take?", "How long is a step?", "How large is the file to keep?"
        for question, (metric, show) in zip(questions, (*units, ("file_bytes", file_size)), strict=True):
            a, b = (row.estimate(metric).mean for row in pair)
            found.append(_card(question, pair, metric, show, f"{number(max(a, b) / min(a, b))} ×; {where}"))
    return found


def _card(question: str, pair: tuple[Row, Row], metric: str, show: Callable[[float], str], note: str) -> Card:
    return Card(question, *(show(row.estimate(metric).mean) for row in pair), note)


def like(rows: list[Row]) -> tuple[Row, Row] | None:
    """(LoRA, full fine-tuning) of the first pair of `LIKE` that both have results."""
    good = {row.arm: row for row in rows if row.good}
    return next(((good[a], good[b]) for a, b in LIKE if a in good and b in good), None)


def best_pair(rows: list[Row]) -> tuple[Row, Row] | None:
    """(LoRA, full fine-tuning) with the lowest loss each; None when either has no result."""
    good = [row for row in rows if row.good and row.arm.method != "none"]
    best = {m: min((r for r in good if r.arm.method == m), key=_loss, default=None) for m in ("lora", "full")}
    return (best["lora"], best["full"]) if all(best.values()) else None


def _loss(row: Row) -> float:
    return row.estimate("loss_last").mean


def _rate(row: Row) -> str:
    return f"{row.good[0]['spec']['lr']:g}"


def _project(folder: Path) -> str | None:
    """The way from a report in benchmarks/results/PRESET to the project's README."""
    return "../../../README.md" if folder.resolve().parts[-3:-1] == ("benchmarks", "results") else None


def _figures(results: Results) -> list[Record]:
    """Every figure as a data URI."""
    found = [(figure, base64.b64encode(plots.svg(figure)).decode()) for figure in plots.figures(results)]
    return [
        {"section": figure.section, "caption": figure.caption, "uri": f"data:image/svg+xml;base64,{data}"}
        for figure, data in found
    ]


def samples(rows: list[Row]) -> list[Record]:
    """How each row's first sample begins, those left out whose beginning was shown before."""
    found: dict[str, Record] = {}
    for row in rows:
        if one := row.sample:
            pieces, left = [], LETTERS
            for text, inside in one["pieces"]:
                pieces, left = [*pieces, (text[: max(0, left)], inside)], left - len(text)
            beginning = "".join(text for text, _ in pieces)[:SAME]
            found.setdefault(one["prompt"] + beginning, {**one, "pieces": pieces, "cut": left < 0, "label": row.label})
    return list(found.values())
