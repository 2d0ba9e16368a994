"""report.html: one file that opens from disk, with figures, tables and samples in it and nothing to fetch."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..store import Record
from ..tables import file_size, model_name, number
from . import arms, plots
from .pages import all_tables, source_page, sweep_table, table_page
from .results import Results, Row, load

TEMPLATE = "report.html.j2"
REPORT, TABLE, SOURCE, PLOTS = "report.html", "table.md", "source.md", "plots"
SAMPLES = 10
PREFERRED = (arms.LORA_INT8, arms.LORA_NF4, arms.LORA_BF16, arms.LORA_FP32)


def write_report(folder: Path) -> str:
    """Write table.md, source.md, plots/*.png and report.html into `folder`; returns what was written, for people.

    Raises:
        XFactorError: the correctness checks have not passed.
    """
    results = load(folder)
    (folder / TABLE).write_text(table_page(results), encoding="utf-8")
    if page := source_page(results):
        (folder / SOURCE).write_text(page, encoding="utf-8")
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
    environment.filters |= {"number": number, "size": file_size, "name": model_name}
    sources = [results.of("source", model=model) for model in results.models("source")]
    return environment.get_template(TEMPLATE).render(
        results=results,
        pairs={group: pair_of(results, group) for group in ("train", "shape")},
        figures=_figures(results),
        tables=all_tables(results),
        sweep=sweep_table(results),
        samples=_samples(results.of("base") + results.of("train")),
        source_samples=[_samples(rows) for rows in sources if any(row.good for row in rows)],
        failures=[(row, record) for row in results.rows for record in row.failures],
        provenance=results.origin(),
    )


def pair_of(results: Results, group: str) -> tuple[Row, Row] | None:
    """(an adapter's row, that of full fine-tuning) of a group for the headlines, None when either has no result."""
    good = {row.arm: row for row in results.of(group) if row.good}
    adapters = [arm for arm in (*PREFERRED, *good) if arm in good and arm.method == "lora"]
    return (good[adapters[0]], good[arms.FULL]) if adapters and arms.FULL in good else None


def _figures(results: Results) -> list[Record]:
    """Every figure as a data URI."""
    found = [(figure, base64.b64encode(plots.svg(figure)).decode()) for figure in plots.figures(results)]
    return [
        {"caption": figure.caption, "wide": figure.wide, "uri": f"data:image/svg+xml;base64,{data}"}
        for figure, data in found
    ]


def _samples(rows: list[Row]) -> list[Record]:
    """The first sample of each arm's first good run, for at most `SAMPLES` arms."""
    shown = [(row, row.good[0]["samples"][0]) for row in rows if row.good and row.good[0]["samples"]]
    return [{**sample, "label": row.label} for row, sample in shown[:SAMPLES]]
