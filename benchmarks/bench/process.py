"""Start a fresh process for a batch of runs, follow its reports, and keep a row for whatever did not come back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .plan import Run
from .provenance import provenance
from .store import write

WORKER = (sys.executable, "-m", "bench.worker")
HOME = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """What every process of a benchmark is given."""

    folder: Path
    folders: dict[str, str] = field(default_factory=dict)
    device: str = "auto"
    threads: int = 1
    worker: tuple[str, ...] = WORKER


def run_batch(
    environment: Environment,
    runs: Sequence[tuple[Run, Path]],
    on_event: Callable[[Run, dict[str, Any]], None],
    *,
    log: str,
    checks: tuple[str, Path] | None = None,
) -> None:
    """Run a batch in one process; when that dies, note it in the row it was at and go on with the rest in a new one.

    Args:
        runs: each with the file it writes.
        on_event: called with the run and the worker's report.
        log: name of the file, in the folder `logs`, that takes what the process prints.
        checks: the model and the file of the correctness checks, if they are wanted.
    """
    left = list(runs)
    while left or checks:
        position, code = _attempt(environment, left, on_event, log, checks)
        if checks and not checks[1].exists():
            raise RuntimeError(f"the correctness checks did not finish; see {environment.folder / 'logs' / log}")
        checks = None
        if code == 0:
            return
        run, file = left[min(position, len(left) - 1)]
        if not file.exists():
            write(file, _died(run, code, environment.folder / "logs" / log, fresh=position == 0))
            on_event(run, {"event": "done", "status": "failed"})
        left = [pair for pair in left if not pair[1].exists()]


def _attempt(environment, runs, on_event, log: str, checks) -> tuple[int, int]:
    """One process; returns the index of the run it was last at, and its exit code."""
    batch = {
        "runs": [{"spec": run.spec(), "file": str(file.resolve())} for run, file in runs],
        "folders": environment.folders,
        "device": environment.device,
        "threads": environment.threads,
        "model": checks[0] if checks else None,
        "checks": str(checks[1].resolve()) if checks else None,
    }
    logs = environment.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    position = 0
    with (logs / log).open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            environment.worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=HOME
        )
        try:
            process.stdin.write(json.dumps(batch))
            process.stdin.close()
            for line in process.stdout:
                event = json.loads(line)
                position = event["index"]
                on_event(runs[position][0], event)
        except BrokenPipeError:
            pass
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
    return position, code


def _died(run: Run, code: int, log: Path, *, fresh: bool) -> dict[str, Any]:
    """The row of a run whose process went away."""
    if code == -signal.SIGKILL:
        status, error = "out of memory", "the process was killed, most likely because memory ran out"
    elif code < 0:
        status, error = "failed", f"the process died of signal {-code}"
    else:
        status, error = "failed", f"the process ended with code {code}: {_last_line(log)}"
    head = {"status": status, "error": error, "label": run.label, "spec": run.spec(), "fresh_process": fresh}
    return {**head, **provenance()}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"
