"""Make every table and figure of the benchmarks from their results, and paste them into README.md and docs.

    python benchmarks/readme.py             make them
    python benchmarks/readme.py --check     change nothing; fail if one is not what the results give

What belongs between the markers <!-- NAME:begin --> and <!-- NAME:end --> of a page is in `PASTED`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from filecmp import cmp
from pathlib import Path

import click
import four_bit
import phrases
import plan_accuracy
import whole
from bench import store
from bench.memory import table as memory
from bench.rate import same
from bench.rate import table as rate
from bench.store import REPOSITORY, RESULTS
from bench.training.report import PLOTS, REPORT, TABLE, write_report

from xfactor_peft.errors import XFactorError

PAGES = (REPOSITORY / "README.md", *(REPOSITORY / "docs" / name for name in ("results.md", "phrases.md", "gguf.md")))


def _packed(folder: Path) -> None:
    """The tables of GGUF files; left as they are where the extra serve is not installed."""
    try:
        from packed import write
    except ModuleNotFoundError as error:
        if error.name not in ("gguf", "xllamacpp"):
            raise
        click.echo(
            f"the tables of {folder.name} are left as they are: {error.name} is missing, of the extra serve", err=True
        )
    else:
        write(folder)


MAKERS: dict[str, Callable[[Path], object]] = {
    "four_bit": four_bit.write,
    "gguf": _packed,
    "lowmem": memory.write,
    "paper": write_report,
    "phrases": phrases.write,
    "plan": plan_accuracy.write,
    "rate": rate.report,
    "same_rate": same.write,
    "whole": whole.write,
}
"""Folder of results: what writes its tables and figures into it."""
PASTED = {
    "benchmark": "paper",
    "four-bit": "four_bit",
    "gguf-logits": "gguf/logits.md",
    "gguf-rates": "gguf/rates.md",
    "gguf-decoding": "gguf/decoding.md",
    "gguf-whole": "gguf/whole.md",
    "headline": "paper/headline.md",
    "lowmem": "lowmem",
    "phrases": "phrases",
    "rate": "rate",
    "rate-bound": "rate/bound.md",
    "whole": "whole",
}
"""Markers: the folder whose table goes between them, or the table itself."""
FIGURES = ("source-loss", "places-rate-kl")


def between(name: str, results: Path, page: Path) -> str:
    """What belongs between the markers of that name; links are relative to the page."""
    folder = results / PASTED[name]
    text = (folder if folder.suffix else folder / TABLE).read_text(encoding="utf-8").strip()
    if name != "benchmark":
        return text
    where = Path(os.path.relpath(RESULTS / folder.name, page.resolve().parent)).as_posix()
    names = [figure for figure in FIGURES if (folder / PLOTS / f"{figure}.png").is_file()]
    figures = " ".join(f'<img src="{where}/{PLOTS}/{figure}.png" alt="{figure}" width="49%">' for figure in names)
    return f"{figures}\n\n{text}. All of it, with samples: [{REPORT}]({where}/{REPORT})."


def pasted(text: str, new: str, name: str) -> str:
    """`text` with `new` between the markers of that name.

    Raises:
        XFactorError: there is not exactly one pair of markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise XFactorError(f"the page needs one line {begin} and below it one line {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{new}\n{end}{rest.partition(end)[2]}"


def make(results: Path, pages: tuple[Path, ...]) -> dict[Path, str]:
    """Write every table and figure into the folders of `results`; returns the pages with theirs pasted."""
    for name, maker in MAKERS.items():
        if (results / name).is_dir():
            maker(results / name)
    texts = {}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name in PASTED:
            if f"<!-- {name}:" in text and (results / PASTED[name]).exists():
                text = pasted(text, between(name, results, page), name)
        texts[page] = text
    return texts


def stale(results: Path, pages: tuple[Path, ...]) -> list[str]:
    """The files that are not what the results give, which are made again from a copy of the records."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "benchmarks" / "results"
        shutil.copytree(results, copy, ignore=shutil.ignore_patterns("*.md", "*.png", "*.html"))
        found = [page.name for page, text in make(copy, pages).items() if page.read_text(encoding="utf-8") != text]
        made = (file.relative_to(copy) for file in copy.rglob("*") if file.is_file())
        return found + [str(file) for file in made if not _same(results / file, copy / file)]


def _same(old: Path, new: Path) -> bool:
    return old.is_file() and cmp(old, new, shallow=False)


@click.command(help=__doc__.split("\n")[0])
@click.option("--results", type=click.Path(path_type=Path, file_okay=False, exists=True), default=RESULTS)
@click.option(
    "--page", "pages", type=click.Path(path_type=Path, dir_okay=False, exists=True), multiple=True, default=PAGES
)
@click.option("--check", is_flag=True, help="Change nothing; fail if something is not up to date.")
def main(results: Path, pages: tuple[Path, ...], check: bool) -> None:
    try:
        if not check:
            for page, text in make(results, pages).items():
                store.write_text(page, text)
        elif found := stale(results, pages):
            raise XFactorError(f"not what the results give: {', '.join(found)}; run: python benchmarks/readme.py")
    except XFactorError as error:
        raise click.ClickException(str(error)) from error
    click.echo("every table and figure is what the results give")


if __name__ == "__main__":
    main()
