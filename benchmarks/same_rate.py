"""Rates after prompts they were not calibrated on: the set head that looks beside one constant logit bias.

    python benchmarks/same_rate.py run                     the demo model, every rate that has no result yet
    python benchmarks/same_rate.py run --rates 0.1 --temperature 0.7 --top-p 0.9
    python benchmarks/same_rate.py run --model FOLDER --label NAME --rates 0.1 --long-texts 2 --merged
    python benchmarks/same_rate.py report                  same.md from the results

One JSON a run in benchmarks/results/same_rate/.
"""

from __future__ import annotations

from itertools import product

import click
from bench.process import Job, Place
from bench.rate.same import ARMS, HEAD, write
from bench.session import Session
from bench.store import RESULTS
from rate import numbers


@click.command(help=__doc__.split("\n")[0])
@click.argument("what", type=click.Choice(["run", "report"]))
@click.option("--model", default="demo", show_default=True)
@click.option("--label", default="demo", show_default=True, help="The model's name in the table.")
@click.option("--contains", default="X", show_default=True, help="The set: tokens that contain this, in any case.")
@click.option("--seeds", default="0", show_default=True, callback=numbers)
@click.option("--rates", default="0.02,0.05,0.1,0.3", show_default=True, callback=numbers)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--arms", default=",".join(ARMS), show_default=True)
@click.option("--texts", default=128, show_default=True, help="After each held-out family of prompts.")
@click.option("--long-texts", default=0, show_default=True, help="Of up to 1,024 tokens after each; 0: none.")
@click.option("--merged", is_flag=True, help="Merge the head, load it with transformers, and measure R again.")
@click.option("--threads", default=2, show_default=True)
@click.option("--force", is_flag=True, help="Run again what has a result.")
def main(what: str, seeds: list[float], rates: list[float], arms: str, threads: int, force: bool, **options) -> None:
    folder = RESULTS / "same_rate"
    if what == "report":
        click.echo(write(folder))
        return
    jobs = []
    for seed, rate, arm in product(map(int, seeds), rates, arms.split(",")):
        decoding = f"T{options['temperature']:g}-p{options['top_p']:g}"
        name = f"{options['label']}-{arm}-{rate:g}-{decoding}-seed{seed}"
        spec = {"arm": arm, "wanted": rate, "seed": seed, **options}
        spec["merged"] = spec["merged"] and arm == HEAD
        jobs.append(Job(f"{name}.json", name, "rate.same:measure", spec, f"{options['label']}-{arm}", 2))
    Session.run_missing(jobs, Place(folder, threads), force=force)


if __name__ == "__main__":
    main()
