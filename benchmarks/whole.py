"""The literal command, from start to exit, in a process of its own: peak memory, wall time, and the same under a limit.

    python benchmarks/whole.py                          every command, three times in turn; medians count
    python benchmarks/whole.py --only demo --rounds 1
    python benchmarks/whole.py --only gpt2m-8bit --limit 1000   inside a memory control group of 1,000 MiB

The peak is the highest VmHWM of the process and of those it starts, read from outside every 10 ms, since a run resets
its own between its phases. A control group counts the page cache, too, and allows no swap; where none can be made the
command says so. The shapes of GPT-2 Medium and Llama-3.2-1B have random weights, which changes neither memory nor
time. Commands with mapped weights always run inside a group, their file written by the first round. A step's time is a
mean, with the first.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
from pathlib import Path

import click
from bench import store
from bench.command import NoGroup, memory_group, train
from bench.store import REPOSITORY, RESULTS, Record
from bench.tables import NONE, Table

GPT2M = REPOSITORY / "build" / "gpt2-medium-random"
LLAMA = REPOSITORY / "build" / "llama-1b-random"
SHAPES = {GPT2M: "gpt2-medium", LLAMA: "llama-3.2-1b"}
SMALL = ["--lora-r", "8", "--steps", "10"]
COMMANDS = {
    "gpt2m-8bit": ["--model", str(GPT2M), *SMALL, "--load-in-8bit", "--checkpointing", "on"],
    "gpt2m-4bit": ["--model", str(GPT2M), *SMALL, "--load-in-4bit", "--checkpointing", "on"],
    "gpt2m-bf16": ["--model", str(GPT2M), *SMALL],
    "gpt2m-8bit-mapped": ["--model", str(GPT2M), *SMALL, "--load-in-8bit", "--weights", "mapped",
                          "--memory-budget", "512MiB", "--no-eval"],
    "llama-4bit": ["--model", str(LLAMA), *SMALL, "--load-in-4bit", "--checkpointing", "on", "--no-eval"],
    "llama-4bit-mapped": ["--model", str(LLAMA), *SMALL, "--load-in-4bit", "--weights", "mapped",
                          "--memory-budget", "1GiB", "--no-eval"],
    "demo": ["--model", "demo", "--lora-r", "8"],
    "demo-rate": ["--model", "demo", "--target-rate", "0.1"],
    "real-rate": ["--target-rate", "0.1", "--contains", "x", "--ignore-case"],
}  # fmt: skip
LIMITS = {"gpt2m-8bit-mapped": 512, "llama-4bit-mapped": 1024}
"""MiB of the control group of commands that are about one."""

COLUMNS = {"peak": "peak, MiB", "anonymous": "RssAnon, MiB", "seconds": "wall, s", "step": "s/step"}


def table(records: list[Record]) -> Table:
    """Medians of the runs that ended well; columns in which no record has anything to say are left out."""
    columns, lines = [key for key in COLUMNS if any(key in one for r in records for one in r["runs"])], []
    for record in records:
        good = [one for one in record["runs"] if one["status"] == "ok"]
        found = [[one[key] for one in good if key in one] for key in columns]
        figures = [f"{statistics.median(values):,.1f}" if values else NONE for values in found]
        limit = f"{record['limit']:,}" if record["limit"] else NONE
        lines.append([f"`xfactor train {' '.join(record['command'])}`", *figures, limit, record["runs"][-1]["status"]])
    heads = ["command", *(COLUMNS[key] for key in columns), "limit, MiB", "ended"]
    said = [i for i in range(len(heads)) if i < 1 + len(columns) or any(line[i] not in (NONE, "ok") for line in lines)]
    return Table([heads[i] for i in said], [[line[i] for i in said] for line in lines])


def write(folder: Path) -> str:
    """Write the table of the records in `folder` beside them; returns it."""
    return store.write_text(folder / "table.md", table(store.read_all(folder)).markdown() + "\n")


@click.command(help=__doc__.split("\n")[0])
@click.option("--only", multiple=True, type=click.Choice(list(COMMANDS)))
@click.option("--rounds", default=3, show_default=True)
@click.option("--limit", type=int, help="MiB of a control group.")
@click.option("--real", type=click.Path(path_type=Path, file_okay=False), help="A folder with a real model.")
@click.option("--threads", default=store.cores(), show_default=True)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS / "whole")
def main(only, rounds, limit, real, threads, output) -> None:  # fmt: skip
    names = [name for name in only or COMMANDS if real or name != "real-rate"]
    for folder, shape in SHAPES.items():
        if any(str(folder) in COMMANDS[name] for name in names) and not (folder / "config.json").is_file():
            maker = REPOSITORY / "tools" / "make_checkpoint.py"
            subprocess.run([sys.executable, maker, folder, "--shape", shape], check=True)
    runs: dict[str, list[Record]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            words = [*COMMANDS[name], *(["--model", str(real)] if name == "real-rate" else [])]
            most = limit or LIMITS.get(name)
            try:
                with memory_group(most) if most else contextlib.nullcontext() as procs:
                    one = train(words, threads, procs)
            except NoGroup as reason:
                raise click.ClickException(str(reason)) from reason
            record = one.pop("record")
            if record.get("steps_made"):
                one["step"] = round(record["seconds"] / record["steps_made"], 2)
            runs[name].append(one)
            click.echo(f"{number + 1}/{rounds} {name}: {one['status']}, {one['peak']:,.0f} MiB, {one['seconds']:.1f} s")
    for name, made in runs.items():
        words = [word.replace(f"{REPOSITORY}/", "") for word in COMMANDS[name]]
        most = limit or LIMITS.get(name)
        record = {"name": name, "command": words, "limit": most, "threads": threads, "runs": made}
        store.write(output / f"{name}{f'-{limit}MiB' if limit else ''}.json", {**record, **store.provenance()})
    click.echo(write(output))


if __name__ == "__main__":
    main()
