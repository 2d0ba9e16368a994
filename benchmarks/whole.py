"""The literal command, from start to exit, in a process of its own: peak memory, wall time, and the same under a limit.

    python benchmarks/whole.py                          every command, three times in turn; medians count
    python benchmarks/whole.py --only demo --rounds 1
    python benchmarks/whole.py --only gpt2m-8bit --limit 1000   inside a memory control group of 1,000 MiB

The peak is the highest VmHWM of the process and of those it starts, read from outside every 10 ms, since a run resets
its own between its phases. A control group counts the page cache, too, and allows no swap; where none can be made the
command says so. GPT-2 Medium's shape has random weights, which changes neither memory nor time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
from bench import store
from bench.store import REPOSITORY, RESULTS, Record
from bench.tables import Table

GPT2M = REPOSITORY / "build" / "gpt2-medium-random"
SMALL = ["--lora-r", "8", "--steps", "10"]
COMMANDS = {
    "gpt2m-8bit": ["--model", str(GPT2M), *SMALL, "--load-in-8bit", "--checkpointing", "on"],
    "gpt2m-4bit": ["--model", str(GPT2M), *SMALL, "--load-in-4bit", "--checkpointing", "on"],
    "gpt2m-bf16": ["--model", str(GPT2M), *SMALL],
    "demo": ["--model", "demo", "--lora-r", "8"],
    "demo-rate": ["--model", "demo", "--target-rate", "0.1"],
    "real-rate": ["--target-rate", "0.1", "--contains", "x", "--ignore-case"],
}
GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
MIB = 2**20


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group of `limit` MiB without swap; raises ClickException where none can be made."""
    first = "memory.limit_in_bytes" if (GROUPS[0] / "memory.limit_in_bytes").exists() else "memory.max"
    group = GROUPS[first == "memory.max"] / f"xfactor-{os.getpid()}"
    try:
        group.mkdir()
        (group / first).write_text(str(limit * MIB))
    except OSError as error:
        raise click.ClickException(f"no memory control group can be made here: {error}") from error
    with contextlib.suppress(OSError):
        (group / ("memory.swappiness" if first != "memory.max" else "memory.swap.max")).write_text("0")
    try:
        yield group / "cgroup.procs"
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [one for child in children.read_text().split() for one in family(int(child))]
    return found


def peak_of(pid: int) -> int:
    """VmHWM in KiB; 0 for a process that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


def run(words: list[str], threads: int, procs: Path | None = None) -> Record:
    """Run `cli.py train` with these words in an empty folder; its peak (MiB), wall time (s) and how it ended."""
    join = None if procs is None else lambda: procs.write_text("0")  # 0: the process that writes
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        command = [sys.executable, str(REPOSITORY / "cli.py"), "train", *words, "--output", str(Path(folder) / "out")]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=join
        )
        while process.poll() is None:
            peak = max(peak, *(peak_of(pid) for pid in family(process.pid)))
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        log.seek(0)
        lines = [line.rstrip() for line in log if line.strip()]
    status = "ok" if process.returncode == 0 else "failed"
    if process.returncode == -signal.SIGKILL:
        status = "killed: out of memory"
    made = {"status": status, "peak": round(peak / 1024, 1), "seconds": round(seconds, 1)}
    return made if status == "ok" else {**made, "log": [line.replace(f"{REPOSITORY}/", "") for line in lines[-10:]]}


def rows(records: list[Record]) -> list[list[str]]:
    found = []
    for record in records:
        good = [one for one in record["runs"] if one["status"] == "ok"]
        middle = [f"{statistics.median(one[key] for one in good):,.1f}" for key in ("peak", "seconds")] if good else []
        where = f"`xfactor train {' '.join(record['command'])}`"
        limit = f"{record['limit']:,}" if record["limit"] else "–"
        found.append([where, *(middle or ["–", "–"]), limit, record["runs"][-1]["status"]])
    return found


@click.command(help=__doc__.split("\n")[0])
@click.option("--only", multiple=True, type=click.Choice(list(COMMANDS)))
@click.option("--rounds", default=3, show_default=True)
@click.option("--limit", type=int, help="MiB of a control group.")
@click.option("--real", type=click.Path(path_type=Path, file_okay=False), help="A folder with a real model.")
@click.option("--threads", default=store.cores(), show_default=True)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS / "whole")
def main(only, rounds, limit, real, threads, output) -> None:  # fmt: skip
    names = [name for name in only or COMMANDS if real or name != "real-rate"]
    if any(name.startswith("gpt2m") for name in names) and not (GPT2M / "config.json").is_file():
        maker = REPOSITORY / "tools" / "make_checkpoint.py"
        subprocess.run([sys.executable, maker, GPT2M, "--shape", "gpt2-medium"], check=True)
    runs: dict[str, list[Record]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            words = [*COMMANDS[name], *(["--model", str(real)] if name == "real-rate" else [])]
            with memory_group(limit) if limit else contextlib.nullcontext() as procs:
                runs[name].append(run(words, threads, procs))
            one = runs[name][-1]
            click.echo(f"{number + 1}/{rounds} {name}: {one['status']}, {one['peak']:,.0f} MiB, {one['seconds']:.1f} s")
    for name, made in runs.items():
        words = [word.replace(f"{REPOSITORY}/", "") for word in COMMANDS[name]]
        record = {"name": name, "command": words, "limit": limit, "threads": threads, "runs": made}
        store.write(output / f"{name}{f'-{limit}MiB' if limit else ''}.json", {**record, **store.provenance()})
    head = ["command", "peak, MiB", "wall, s", "limit, MiB", "ended"]
    table = Table(head, rows(store.read_all(output))).markdown()
    (output / "table.md").write_text(table + "\n", encoding="utf-8")
    click.echo(table)


if __name__ == "__main__":
    main()
