"""What a plan predicts against what the literal command takes, and whether the command lives within it.

    python benchmarks/plan_accuracy.py                          forty short runs, each in a process of its own
    python benchmarks/plan_accuracy.py --only demo --limited    also in a memory control group of 1.05 x the plan
    python benchmarks/plan_accuracy.py --real FOLDER            with a real model's configurations

A configuration whose record is there already is not run again. The peak is read from outside (`bench.command`); the
record of the run says what was predicted. Exit status 1 when a run fails or is killed.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from pathlib import Path

import click
from bench import store
from bench.command import MIB, NoGroup, memory_group, train
from bench.configurations import MADE, configurations, make_models
from bench.store import REPOSITORY, RESULTS, Record
from bench.tables import Table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(REPOSITORY))

ROOM = 1.05
"""A control group's limit, as a multiple of the plan."""


def measure(words: list[str], threads: int) -> Record:
    """Predicted and measured peak, MiB, by phase."""
    made = train(words, threads)
    record = made.pop("record")
    if made["status"] != "ok" or not record.get("plan"):
        return {**made, "status": made["status"] if made["status"] != "ok" else "not planned"}
    plan = record["plan"]
    phases = {phase["name"]: round(phase["total"] / MIB, 1) for phase in plan["phases"]}
    inside = {name: record[f"{name}_peak"].get("rss_mib") for name in ("load", "train", "sampling")}
    predicted = plan["total"] / MIB
    parts = {name: round(size / MIB, 1) for name, size in plan["memory"].items()}
    return {
        **made, "predicted": round(predicted, 1), "error": round(predicted / made["peak"] - 1, 4),
        "highest": plan["highest"], "phases": phases, "inside": inside, "parts": parts,
    }  # fmt: skip


def confine(words: list[str], threads: int, predicted: float) -> Record:
    """The same run in a control group of 1.05 x the plan."""
    limit = math.ceil(ROOM * predicted)
    try:
        with memory_group(limit) as procs:
            made = train(words, threads, procs)
    except NoGroup as reason:
        return {"limit": limit, "status": "skipped", "reason": str(reason)}
    made.pop("record")
    return {"limit": limit, **made}


def table(records: list[Record]) -> str:
    """Every configuration, and below the median and the largest error and how many were killed."""
    rows = []
    for one in records:
        limited = one.get("limited") or {}
        figures = [f"{one[key]:,.0f}" if key in one else "–" for key in ("predicted", "peak")]
        error = f"{one['error']:+.1%}" if "error" in one else one["status"]
        inside = [f"{limited[key]:,.0f}" if key in limited else "–" for key in ("limit", "peak", "anonymous")]
        rows.append([one["name"], *figures, error, one.get("highest", "–"), *inside, limited.get("status", "–")])
    head = ["configuration", "plan, MiB", "VmHWM, MiB", "error", "highest phase", "limit, MiB", "VmHWM", "RssAnon",
            "ended"]  # fmt: skip
    errors = [abs(one["error"]) for one in records if "error" in one]
    ends = [one["limited"]["status"] for one in records if one.get("limited")]
    summary = ""
    if errors:
        summary = (
            f"{len(errors)} configurations: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}"
        )
    if ends:
        summary += f"; within 1.05 x the plan {ends.count('ok')} of {len(ends)} ran to their end"
    return f"{Table(head, rows).markdown()}\n\n{summary}\n"


def write(folder: Path) -> str:
    """Write the table of the records in `folder` beside them; returns it."""
    return store.write_text(folder / "table.md", table(store.read_all(folder)))


@click.command(help=__doc__.split("\n")[0])
@click.option("--only", multiple=True, metavar="WORD", help="Configurations whose name begins with this.")
@click.option("--limited", is_flag=True, help="Run each again in a control group of 1.05 x its plan.")
@click.option("--again", is_flag=True, help="Run what has a record, too.")
@click.option("--real", type=click.Path(path_type=Path, file_okay=False), help="A folder with a real model.")
@click.option(
    "--gpt2m", type=click.Path(path_type=Path, file_okay=False), default=REPOSITORY / "build/gpt2-medium-random"
)
@click.option("--threads", default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS / "plan")
def main(only, limited, again, real, gpt2m, threads, output) -> None:  # fmt: skip
    models = {"demo": "demo", "gpt2m": str(gpt2m), **({"real": str(real)} if real else {})}
    wanted = {name: words for name, words in configurations().items() if not only or name.startswith(only)}
    if any(words[1] in MADE for words in wanted.values()):
        models |= make_models(REPOSITORY / "build" / "plan")
    failed = False
    for name, words in wanted.items():
        if words[1] not in models:
            continue
        if words[1] == "gpt2m":
            store.make_checkpoint(gpt2m, "gpt2-medium")
        literal, file = [words[0], models[words[1]], *words[2:]], output / f"{name}.json"
        found = None if again else store.read(file)
        if found is None or "error" not in found:
            about = {"name": name, "command": words, "threads": threads}
            found = {**about, **measure(literal, threads), **store.provenance()}
            store.write(file, found)
            figures = f"plan {found.get('predicted')}, measured {found['peak']}, {found['seconds']} s"
            click.echo(f"{name}: {found['status']}, {figures}")
        if limited and "error" in found and (again or "limited" not in found):
            found["limited"] = confine(literal, threads, found["predicted"])
            store.write(file, found)
            click.echo(f"{name} within {found['limited']['limit']} MiB: {found['limited']['status']}")
        failed |= "error" not in found or found.get("limited", {}).get("status", "ok") not in ("ok", "skipped")
    click.echo(write(output))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
