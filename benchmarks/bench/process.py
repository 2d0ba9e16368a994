"""A job in a fresh process. Whatever becomes of it there is a record, which says why a process died.

    python -m bench.process < job.json

is that process: it writes the record, and prints a line [steps done, loss] for each step. Whatever libraries print goes
to stderr instead.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import store
from .store import Record

HOME = Path(__file__).resolve().parents[1]
WORKER = (sys.executable, "-m", "bench.process")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
OnStep = Callable[[int, float], None]
"""Called with the steps done and the loss."""


@dataclass(frozen=True)
class Job:
    """A call whose figures are kept.

    Attributes:
        file: of the record, below the folder of results.
        label: for people.
        call: "module:function" of this package: function(spec, on_step, **given) -> figures, fit for JSON.
        spec: the whole setting, fit for JSON.
        kind: jobs of a kind take about as long.
        steps: how many `on_step` will be told of.
    """

    file: str
    label: str
    call: str
    spec: Record
    kind: str = ""
    steps: int = 0


@dataclass(frozen=True)
class Place:
    """Where jobs leave records and logs, and what every call is given besides its spec.

    `worker` is the command of the process; None runs jobs in this process, as tests do: its peaks mean nothing.
    """

    folder: Path
    threads: int = 1
    given: Record = field(default_factory=dict)
    worker: tuple[str, ...] | None = WORKER


def run(job: Job, place: Place, on_step: OnStep = lambda step, loss: None) -> Record:
    """Run a job; returns its record, which lies in `place.folder / job.file`."""
    file, log = place.folder / job.file, place.folder / "logs" / f"{Path(job.file).stem}.log"
    file.unlink(missing_ok=True)
    order = {**asdict(job), "file": str(file.resolve()), "given": place.given, "threads": place.threads}
    code = perform(order, on_step) if place.worker is None else _start(place.worker, order, log, on_step)
    record = store.read(file)
    if record is None:
        record = {**_death(code, log), "label": job.label, "spec": job.spec, **store.provenance()}
        store.write(file, record)
    return record


def _start(worker: tuple[str, ...], order: Record, log: Path, on_step: OnStep) -> int:
    """The exit code of a process that took the order on stdin and reported its steps on stdout."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(worker, text=True, cwd=HOME, **pipes) as process:
            try:
                process.stdin.write(json.dumps(order))
                process.stdin.close()
                for line in process.stdout:
                    on_step(*json.loads(line))
            except BrokenPipeError:
                pass
            except BaseException:
                process.kill()
                raise
    return process.returncode


def _death(code: int, log: Path) -> Record:
    if code == -signal.SIGKILL:
        return {"status": "out of memory", "error": "the process was killed, most likely because memory ran out"}
    last = [line.strip()[:200] for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    end = f"died of signal {-code}" if code < 0 else f"ended with code {code}"
    return {"status": "failed", "error": f"the process {end}: {last[0] if last else 'it said nothing'}"}


def perform(order: Record, on_step: OnStep) -> int:
    """Make the call and write its record, a failure's too: one arm's failure is not the end of the benchmark."""
    import torch  # here, so that whoever only starts processes need not wait for it

    torch.set_num_threads(order["threads"])
    started, record = time.perf_counter(), {"status": "ok", "label": order["label"], "spec": order["spec"]}
    try:
        module, _, name = order["call"].partition(":")
        function = getattr(importlib.import_module(f"bench.{module}"), name)
        record |= function(order["spec"], on_step, **order["given"])
    except Exception as error:
        traceback.print_exc()
        words = str(error).strip().split("\n")[0] or type(error).__name__
        exhausted = isinstance(error, MemoryError) or any(word in words.lower() for word in OUT_OF_MEMORY)
        record |= {"status": "out of memory" if exhausted else "failed", "error": words}
    record["wall"] = round(time.perf_counter() - started, 2)
    store.write(Path(order["file"]), {**record, **store.provenance()})
    return 0


def main() -> None:
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.filterwarnings("ignore")
    perform(json.load(sys.stdin), lambda step, loss: print(json.dumps([step, loss]), file=reports))


if __name__ == "__main__":
    main()
