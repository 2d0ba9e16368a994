"""Paste tables and figures of the benchmarks into README.md and docs/results.md, between markers.

    python benchmarks/readme.py                     from benchmarks/results/quick
    python benchmarks/readme.py RESULTS --check     fail if a page does not hold what the results say

The markers are lines of their own: <!-- benchmark:begin --> and <!-- benchmark:end -->. The tables of `whole.py`,
`memory.py` and `rate.py`, and the source's of the preset paper, go between markers named whole, lowmem, rate and
source, on every page that has them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click
from bench.memory.table import stored as memory_table
from bench.rate.table import stored as rate_table
from bench.store import REPOSITORY, RESULTS
from bench.training.pages import all_tables, source_page
from bench.training.plots import save_png
from bench.training.report import PLOTS, REPORT
from bench.training.results import Results, load

from xfactor_peft.errors import XFactorError

MARKER = "benchmark"
README = REPOSITORY / "README.md"
PAGES = (README, REPOSITORY / "docs" / "results.md")
FIGURES = ("rate-kl", "memory")
OTHERS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "whole": ("whole", lambda folder: (folder / "table.md").read_text("utf-8")),
    "lowmem": ("lowmem", memory_table),
    "rate": ("rate", rate_table),
    "source": ("paper", lambda folder: source_page(load(folder)) or ""),
}
"""What else is pasted: the markers' name, the folder of results, and what makes Markdown of it."""


def section(results: Results, readme: Path) -> str:
    """What belongs between the main markers; links are relative to the README."""
    where = Path(os.path.relpath(results.folder, readme.resolve().parent)).as_posix()
    names = [name for name in FIGURES if (results.folder / PLOTS / f"{name}.png").is_file()]
    figures = " ".join(f'<img src="{where}/{PLOTS}/{name}.png" alt="{name}" width="49%">' for name in names)
    tables = [table.section() for table in all_tables(results).values()]
    origin = f"Made by `bash benchmarks/run.sh --preset {results.manifest['preset']}` and pasted by "
    origin += "`python benchmarks/readme.py`; all of it, with samples, is in "
    origin += f"[{REPORT}]({where}/{REPORT}). {results.origin()}."
    return "\n\n".join(part for part in (figures, *tables, origin) if part)


def pasted(text: str, new: str, name: str = MARKER) -> str:
    """`text` with `new` between the markers of that name.

    Raises:
        XFactorError: there is not exactly one pair of markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise XFactorError(f"the README needs one line {begin} and below it one line {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{new}\n{end}{rest.partition(end)[2]}"


def with_other_tables(text: str) -> str:
    """`text` with the tables of the other benchmarks, as far as it has their markers and they have results."""
    for name, (folder, table) in OTHERS.items():
        if f"<!-- {name}:begin -->" in text and (RESULTS / folder).is_dir():
            text = pasted(text, table(RESULTS / folder).strip(), name)
    return text


@click.command()
@click.argument("results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS / "quick")
@click.option(
    "--page", "pages", type=click.Path(path_type=Path, dir_okay=False, exists=True), multiple=True, default=PAGES
)
@click.option("--check", is_flag=True, help="Change nothing; fail if a page is not up to date.")
def main(results: Path, pages: tuple[Path, ...], check: bool) -> None:
    """Paste the tables and figures of RESULTS and of the other benchmarks into every page."""
    try:
        loaded = load(results.resolve())
        if not check:
            save_png(loaded, loaded.folder / PLOTS)
        for page in pages:
            old = page.read_text(encoding="utf-8")
            new = with_other_tables(old if page == README else pasted(old, section(loaded, page)))
            if check and new != old:
                raise XFactorError(f"{page.name} differs from the results; run: python benchmarks/readme.py {results}")
            if new != old:
                page.write_text(new, encoding="utf-8")
            click.echo(f"{page.name} is up to date")
    except XFactorError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
