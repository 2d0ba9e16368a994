"""Paste the benchmark's tables and figure into README.md, between its two markers.

    python benchmarks/readme.py                     from benchmarks/results/quick
    python benchmarks/readme.py RESULTS --check     fail if the README does not hold what the results say

The markers are lines of their own: <!-- benchmark:begin --> and <!-- benchmark:end -->. Tables that the other
benchmarks wrote (`memory.py`, `rate.py`) go between markers named lowmem and rate, and the source's table of the preset
paper between markers named source, where the README has them.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from xfactor_peft.errors import XFactorError

from .plots import save_png
from .provenance import REPOSITORY, RESULTS
from .report import PLOTS, REPORT
from .results import Results, load
from .tables import all_tables, provenance_line

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
OTHERS = {"lowmem": "lowmem/table.md", "rate": "rate/table.md", "source": "paper/source.md"}
"""What else is pasted as it stands: the markers' name, and the file in the results."""
FIGURES = ("rate-kl", "memory")


def section(results: Results, readme: Path) -> str:
    """What belongs between the markers; links are relative to the README."""
    where = Path(os.path.relpath(results.folder, readme.resolve().parent)).as_posix()
    names = [name for name in FIGURES if (results.folder / PLOTS / f"{name}.png").is_file()]
    figures = " ".join(f'<img src="{where}/{PLOTS}/{name}.png" alt="{name}" width="49%">' for name in names)
    tables = [f"{table.caption}\n\n{table.markdown()}" for table in all_tables(results).values()]
    command = f"`bash benchmarks/run.sh --preset {results.manifest['preset']}`"
    origin = f"Made by {command} and pasted by `python benchmarks/readme.py`; "
    origin += f"all of it, with samples, is in [{REPORT}]({where}/{REPORT}). {provenance_line(results)}."
    return "\n\n".join(part for part in (figures, *tables, origin) if part)


def pasted(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `new` between the markers.

    Raises:
        XFactorError: there is not exactly one pair of markers.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise XFactorError(f"the README needs one line {begin} and below it one line {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{new}\n{end}{rest.partition(end)[2]}"


def with_other_tables(text: str) -> str:
    """`text` with the tables of the other benchmarks, as far as it has their markers and they have results."""
    for name, file in OTHERS.items():
        begin, table = BEGIN.replace("benchmark", name), REPOSITORY / RESULTS / file
        if begin in text and table.is_file():
            text = pasted(text, table.read_text(encoding="utf-8").strip(), begin, END.replace("benchmark", name))
    return text


@click.command()
@click.argument("results", type=click.Path(path_type=Path, file_okay=False), default=REPOSITORY / RESULTS / "quick")
@click.option(
    "--readme", type=click.Path(path_type=Path, dir_okay=False, exists=True), default=REPOSITORY / "README.md"
)
@click.option("--check", is_flag=True, help="Change nothing; fail if the README is not up to date.")
def main(results: Path, readme: Path, check: bool) -> None:
    """Paste the tables and figures of RESULTS into the README."""
    try:
        loaded = load(results.resolve())
        if not check:
            save_png(loaded, loaded.folder / PLOTS)
        old = readme.read_text(encoding="utf-8")
        new = with_other_tables(pasted(old, section(loaded, readme)))
    except XFactorError as error:
        raise click.ClickException(str(error)) from error
    if check and new != old:
        raise click.ClickException(
            f"{readme.name} differs from the results; run: python benchmarks/readme.py {results}"
        )
    if new != old:
        readme.write_text(new, encoding="utf-8")
    click.echo(f"{readme.name} is up to date")
