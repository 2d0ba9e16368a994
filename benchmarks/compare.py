"""What moved between two benchmarks, by how much, and whether beyond noise.

    python benchmarks/compare.py OLD NEW            folders of results
    python benchmarks/compare.py OLD NEW --all      also what did not move

Figures are judged by their 99 % intervals, over seeds or of the one run, times by the spread of single steps as well,
peaks of memory by a fixed allowance, counts exactly.
"""

from __future__ import annotations

from pathlib import Path

import click
from bench.training.changes import caveats, compare
from bench.training.results import load

from xfactor_peft.errors import XFactorError

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("old", type=FOLDER)
@click.argument("new", type=FOLDER)
@click.option("--all", "everything", is_flag=True, help="Also figures that moved no further than noise.")
def main(old: Path, new: Path, everything: bool) -> None:
    """Compare the results in folder NEW with those in OLD."""
    try:
        results = load(old), load(new)
    except XFactorError as error:
        raise click.ClickException(str(error)) from error
    found = compare(*results)
    moved = [change for change in found if change.verdict not in ("noise", "one seed")]
    lines, shown = caveats(*results), found if everything else moved
    for arm in dict.fromkeys(change.arm for change in shown):
        lines += ["", arm, *(f"  {change}" for change in shown if change.arm == arm)]
    untold = sum(change.noise is None for change in found)
    unclear = f"; {untold} have one seed and no interval, so nothing is said of them" if untold else ""
    click.echo("\n".join([*lines, "", f"{len(moved)} of {len(found)} figures moved beyond noise{unclear}"]))


if __name__ == "__main__":
    main()
