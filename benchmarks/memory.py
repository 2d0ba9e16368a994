"""GPT-2 Medium's shape on a small machine: memory and step time of this package and of the usual stack.

    python benchmarks/memory.py                 everything: parity first, then the table
    python benchmarks/memory.py --rounds 3      each arm three times, in turn; medians count

The weights are random (tools/make_checkpoint.py), which changes neither memory nor time, and the table says so. Each
run of an arm is a process of its own. First 50 steps of LoRA in bf16 and in 8 bits must follow plain fp32 LoRA with the
same seed and inputs; when they do not, nothing is printed.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from bench import process, store
from bench.memory.arms import ARMS, PARITY, REFERENCE, Arm
from bench.memory.table import SUMMARY, summarise, write
from bench.process import Job, Place
from bench.session import Session
from bench.store import REPOSITORY, RESULTS

FOLDER = click.Path(path_type=Path, file_okay=False)


def job_of(arm: Arm, steps: int, name: str) -> Job:
    if arm.length > 64 or arm.method == "full":
        steps = max(4, steps // 3)
    file = f"runs/{name}-{arm.name.replace(', ', '-').replace(' ', '-')}.json"
    return Job(file, arm.name, "memory.measure:measure", {"arm": asdict(arm), "steps": steps}, arm.name, steps)


def check_parity(place: Place, steps: int) -> dict[str, float]:
    """Largest relative difference of the losses from plain fp32 LoRA, by arm; exits when one is too large."""

    def losses(arm: Arm) -> list[float]:
        record = process.run(job_of(arm, steps, "parity"), place)
        if record["status"] != "ok":
            raise click.ClickException(f"{arm.name}: {record['error']}")
        return record["losses"]

    reference, worst = losses(REFERENCE), {}
    for arm, most in PARITY.items():
        worst[arm.name] = max(abs(a - b) / b for a, b in zip(losses(arm), reference, strict=True))
        click.echo(f"parity over {steps} steps, {arm.name}: {worst[arm.name]:.3%} of {most:.0%}")
        if not worst[arm.name] <= most:
            raise click.ClickException(f"{arm.name} does not follow plain fp32 LoRA; no figure is worth printing")
    return worst


@click.command(help=__doc__.split("\n")[0])
@click.option("--checkpoint", type=FOLDER, default=REPOSITORY / "build" / "gpt2-medium-random", help="Made if missing.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--steps", default=10, show_default=True, help="Steps of each run; the first two are not timed.")
@click.option("--parity-steps", default=50, show_default=True)
@click.option("--arms", help='Names, separated by ";".  [default: all]')
@click.option("--threads", default=store.cores(), show_default=True)
@click.option("--output", type=FOLDER, default=RESULTS / "lowmem")
def main(checkpoint, rounds, steps, parity_steps, arms, threads, output) -> None:  # fmt: skip
    store.make_checkpoint(checkpoint, "gpt2-medium")
    place = Place(output, threads, {"checkpoint": str(checkpoint.resolve())})
    record = {**store.provenance(), "rounds": rounds, "steps": steps, "parity": check_parity(place, parity_steps)}
    chosen = [arm for arm in ARMS if not arms or arm.name in arms.split(";")]
    jobs = [job_of(arm, steps, f"round{index}") for index in range(rounds) for arm in chosen]
    session, runs = Session(place, [job.kind for job in jobs]), {}
    for job in jobs:
        runs.setdefault(job.label, []).append(session.run(job))
    record["rows"] = summarise(runs)
    store.write(output / SUMMARY, record)
    click.echo(write(output))


if __name__ == "__main__":
    main()
