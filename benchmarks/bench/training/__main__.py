"""The command line of `bash benchmarks/run.sh`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from xfactor_peft.errors import XFactorError

from ..process import Place
from ..store import RESULTS, cores
from .presets import PRESETS

PRESET_HELP = "quick: minutes. paper: the source's recipe. full: every rank and target. smoke: does it run?"
OUTPUT = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), default="quick", show_default=True, help=PRESET_HELP)
@click.option("--model", help="Another model to train: a folder or a cached Hub id.  [default: demo]")
@click.option("--output", type=OUTPUT, metavar="DIR", help="Results and report.  [default: benchmarks/results/PRESET]")
@click.option("--device", default="auto", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: one a core]")
@click.option("--retry", is_flag=True, help="Run failed arms again; finished ones are never run twice.")
@click.option("--offline", is_flag=True, help="Do not look for GPT-2 Medium's real weights on the Hub.")
@click.option(
    "--only", multiple=True, metavar="TEXT", help="Only runs with this in their file's name, and no report; repeatable."
)
@click.option("--report-only", is_flag=True, help="Make tables, plots and report.html from what is there.")
def main(preset, model, output, device, threads, retry, offline, only, report_only) -> None:  # fmt: skip
    """Train every arm of a preset in a fresh process, then write tables, plots and report.html.

    Start it again after an interruption: arms that are done are kept.
    """
    from .report import write_report
    from .runner import run_preset

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model = model or ("tiny-random" if preset == "smoke" else "demo")
    folder = output or RESULTS / preset
    try:
        if not report_only:
            place = Place(folder, threads or cores())
            run_preset(PRESETS[preset], place, model, device=device, retry=retry, offline=offline, only=only)
        if not only:
            click.echo(write_report(folder))
    except XFactorError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main(prog_name="bash benchmarks/run.sh")
