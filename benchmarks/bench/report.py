"""report.html: one file that opens from disk, with figures, tables and samples in it and nothing to fetch."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import plots
from .headlines import compared, headlines
from .results import Results, Row, load
from .source_page import PAGE, source_page
from .tables import all_tables, markdown, number, provenance_line, sweep_table

TEMPLATE = "report.html.j2"
REPORT, TABLE, PLOTS = "report.html", "table.md", "plots"
SAMPLES = 10


def write_report(folder: Path) -> str:
    """Write table.md, plots/*.png and report.html into `folder`; returns what was written, for the terminal.

    Raises:
        XFactorError: the correctness checks have not passed.
    """
    results = load(folder)
    (folder / TABLE).write_text(markdown(results), encoding="utf-8")
    if page := source_page(results):
        (folder / PAGE).write_text(page, encoding="utf-8")
    pictures = plots.save_png(results, folder / PLOTS)
    (folder / REPORT).write_text(html(results), encoding="utf-8")
    failures = sum(len(row.failures) for row in results.rows)
    lines = [f"{folder / TABLE}", f"{folder / PLOTS}: {len(pictures)} figures", f"{folder / REPORT}"]
    return "\n".join(lines + ([f"{failures} runs failed; their rows say why"] if failures else []))


def html(results: Results) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    sources = [rows for rows in _by_model(results, "source") if any(row.good for row in rows)]
    return environment.get_template(TEMPLATE).render(
        results=results,
        compared=compared(results),
        headlines=headlines(results),
        figures=_figures(results),
        tables=all_tables(results),
        sweep=sweep_table(results),
        samples=_samples(results.of("base") + results.of("train")),
        source_samples=[_samples(rows) for rows in sources],
        failures=[(row, record) for row in results.rows for record in row.failures],
        provenance=provenance_line(results),
    )


def _figures(results: Results) -> list[dict[str, str]]:
    """Every figure in both themes, as data URIs."""
    both = [plots.figures(results, theme) for theme in (plots.LIGHT, plots.DARK)]
    return [
        {
            "name": name,
            "caption": caption,
            "wide": name not in plots.FLAT,
            "light": _data_uri(plots.svg(light)),
            "dark": _data_uri(plots.svg(both[1][name][0])),
        }
        for name, (light, caption) in both[0].items()
    ]


def _data_uri(picture: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture).decode()


def _samples(rows: list[Row]) -> list[dict[str, Any]]:
    """The first sample of each arm's first good run, for at most `SAMPLES` arms."""
    shown = [(row, row.good[0]["samples"][0]) for row in rows if row.good and row.good[0]["samples"]]
    return [{**sample, "label": row.label, "pieces": tidy(sample["pieces"])} for row, sample in shown[:SAMPLES]]


def tidy(pieces: list[list[Any]]) -> list[tuple[str, bool]]:
    """Pieces without the marks' outer white space, which a token carries and a highlight should not."""
    found: list[tuple[str, bool]] = []
    for text, inside in pieces:
        if inside and text.strip():
            core = text.strip()
            before, after = text[: text.index(core)], text[text.index(core) + len(core) :]
            found += [(before, False), (core, True), (after, False)]
        else:
            found.append((text, False))
    return [(text, inside) for text, inside in found if text]


def _by_model(results: Results, group: str) -> list[list[Row]]:
    models = dict.fromkeys(row.model for row in results.of(group))
    return [results.of(group, model=model) for model in models]
