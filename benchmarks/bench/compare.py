"""What moved between two benchmarks, by how much, and whether beyond noise.

    python benchmarks/compare.py OLD NEW            folders of results
    python benchmarks/compare.py OLD NEW --all      also what did not move

Figures over seeds are judged by Welch's test, those of one seed by their own intervals, times by the spread of single
steps, peaks of memory by a fixed allowance, counts exactly; intervals are 99 %.
"""

from __future__ import annotations

from pathlib import Path

import click

from xfactor_peft.errors import XFactorError

from . import changes
from .results import Results, load
from .tables import number

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("old", type=FOLDER)
@click.argument("new", type=FOLDER)
@click.option("--all", "everything", is_flag=True, help="Also figures that moved no further than noise.")
def main(old: Path, new: Path, everything: bool) -> None:
    """Compare the results in folder NEW with those in OLD."""
    try:
        before, after = load(old), load(new)
    except XFactorError as error:
        raise click.ClickException(str(error)) from error
    for line in caveats(before, after):
        click.echo(line)
    found = changes.compare(before, after)
    shown = [change for change in found if everything or change.moved]
    for arm in dict.fromkeys(change.arm for change in shown):
        click.echo(f"\n{arm}")
        for change in (change for change in shown if change.arm == arm):
            click.echo("  " + line_of(change))
    moved = sum(change.moved for change in found)
    untold = sum(change.noise is None for change in found)
    unclear = f"; {untold} have one seed and no interval, so nothing is said of them" if untold else ""
    click.echo(f"\n{moved} of {len(found)} figures moved beyond noise{unclear}")


def line_of(change: changes.Change) -> str:
    """One figure: old, new, difference, and how much of it may be chance."""
    share = f", {change.difference / abs(change.old):+.1%}" if change.old else ""
    noise = "unknown" if change.noise is None else f"± {number(change.noise)}"
    sign = "+" if change.difference >= 0 else "-"
    words = (
        f"{number(change.old)} → {number(change.new)} ({sign}{number(abs(change.difference))}{share}; noise {noise})"
    )
    return f"{change.verdict:8}  {change.metric.title}: {words}"


def caveats(old: Results, new: Results) -> list[str]:
    """What the two benchmarks do not have in common."""
    lines = []
    if not changes.same_hardware(old, new):
        lines.append("not the same hardware: times and peaks of memory are not compared")
    for label in changes.differing_settings(old, new):
        lines.append(f"other settings, so its figures mean something else: {label}")
    lines += [f"only in the old benchmark: {label}" for label in changes.only_in(old, new)]
    lines += [f"only in the new benchmark: {label}" for label in changes.only_in(new, old)]
    return lines
