"""Rates: what each way to a wanted R costs, against the exact logit bias.

    python benchmarks/rate.py run --model demo            every arm that has no result yet
    python benchmarks/rate.py run --arms tilt,sequence --rates 0.1 --seeds 0
    python benchmarks/rate.py run --arms sequence-w0.3    planning at another price of what it does outside of the set
    python benchmarks/rate.py bound                       the least KL that any policy could do with, beside theirs
    python benchmarks/rate.py report                      table.md, bound.md and rate-kl.png from the results

One JSON a run in benchmarks/results/rate/: settings, scores, versions, machine. A run that failed keeps its row.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import click
from bench.process import Job, Place
from bench.rate import bound
from bench.rate.table import report
from bench.session import Session
from bench.store import RESULTS

from xfactor_peft.errors import XFactorError

AT_EVERY_RATE, AT_FEW_RATES = ("tilt", "sequence"), ("blocks-r1", "blocks-r4", "blocks-r16", "trl")
ARMS = ("bias", "tilt", "suppress", "blocks-r1", "blocks-r4", "blocks-r16", "uniform-lora", "uniform-full", "trl",
        "sequence-w1", "sequence")  # fmt: skip
STRENGTHS = 1.7, 2.7, 3.5, 5.2
"""Of the logit biases whose bound is looked for: R is about 0.02, 0.05, 0.1 and 0.3."""


def numbers(context, option, text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def jobs_of(arms: list[str], options: dict) -> list[Job]:
    """Every arm with every seed, at the rates that it is run at."""
    settings = {key: options[key] for key in ("model", "dtype", "contains", "sequence_steps")}
    jobs = []
    for seed in map(int, options["seeds"]):
        for arm in arms:
            few = options["few_rates"] if arm in AT_FEW_RATES else [0.0]
            for rate in options["rates"] if arm.startswith(AT_EVERY_RATE) else few:
                spec = {"arm": arm, "wanted": rate, "seed": seed, **settings}
                name = f"{arm}-{rate:g}-seed{seed}"
                jobs.append(Job(f"{name}.json", name, "rate.measure:measure", spec, arm))
    return jobs


def bounds(folder: Path, options: dict) -> list[Job]:
    """Of logit biases, and of the planned policies that have results."""
    model = {key: options[key] for key in ("model", "contains")}
    policies = {f"tilt-{strength:g}": {"strength": strength} for strength in STRENGTHS} | bound.planned(folder)
    return [Job(f"bound/{name}.json", f"bound of {name}", "rate.bound:measure", {**model, "policy": name, **policy},
                "bound", bound.ROUNDS) for name, policy in policies.items()]  # fmt: skip


@click.command(help=__doc__.split("\n")[0])
@click.argument("what", type=click.Choice(["run", "bound", "report"]))
@click.option("--model", default="demo", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--contains", default="X", show_default=True, help="The set: tokens that contain this, in any case.")
@click.option("--seeds", default="0,1,2", show_default=True, callback=numbers)
@click.option("--rates", default="0.02,0.05,0.1,0.3,0.6", show_default=True, callback=numbers)
@click.option("--few-rates", default="0.1", show_default=True, callback=numbers, help="Of blocks-r* and trl.")
@click.option("--arms", default=",".join(ARMS), show_default=True)
@click.option("--sequence-steps", default=80, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--force", is_flag=True, help="Run again what has a result.")
def main(what: str, arms: str, threads: int, force: bool, **options) -> None:
    folder, chosen = RESULTS / "rate", arms.split(",")
    if what == "run":
        if "trl" in chosen and not find_spec("trl"):
            click.echo('the arm trl is left out; it needs: pip install -e ".[rl]"')
            chosen.remove("trl")
        Session.run_missing(jobs_of(chosen, options), Place(folder, threads), force=force)
        return
    if what == "bound":
        Session.run_missing(bounds(folder, options), Place(folder, threads), force=force)
        return
    try:
        click.echo(report(folder))
    except XFactorError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
