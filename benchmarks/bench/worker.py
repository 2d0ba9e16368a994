"""The process that runs a batch: reads it from stdin, writes one JSON a run, reports on stdout.

    python -m bench.worker < batch.json

Reports are lines of JSON: {"event": "start" | "step" | "done", "index": ..., ...}. Whatever libraries print goes to
stderr instead. A run that raises keeps its row; a process that is killed loses only the run it was at.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, TextIO

from .plan import Run
from .provenance import provenance
from .store import write


def main() -> None:
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    batch = json.load(sys.stdin)
    warnings.filterwarnings("ignore")
    import torch  # after the batch is known to be readable

    from .measure import Places

    torch.set_num_threads(batch["threads"])
    places = Places(batch["folders"], batch["device"])
    if batch["checks"]:
        from .checks import run_checks

        write(Path(batch["checks"]), {**run_checks(batch["model"], places), **provenance()})
    for index, item in enumerate(batch["runs"]):
        run_one(index, Run.of(item["spec"]), Path(item["file"]), places, reports)


def run_one(index: int, run: Run, file: Path, places: Any, reports: TextIO) -> None:
    from .measure import measure

    def report(event: str, **more: Any) -> None:
        print(json.dumps({"event": event, "index": index, **more}), file=reports, flush=True)

    report("start")
    head = {"status": "ok", "label": run.label, "spec": run.spec(), "fresh_process": index == 0}
    try:
        figures = measure(run, places, lambda step, loss: report("step", step=step, loss=loss))
    except Exception as error:  # any failure of one arm is a row of the table, not the end of the benchmark
        traceback.print_exc()
        head |= {"status": status_of(error)}
        figures = {"error": str(error).strip().split("\n")[0] or type(error).__name__}
    write(file, {**head, **figures, **provenance()})
    report("done", status=head["status"])


def status_of(error: Exception) -> str:
    """ "out of memory" when an allocator said so, else "failed"."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    exhausted = isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
    return "out of memory" if exhausted else "failed"


if __name__ == "__main__":
    main()
