"""The loop: checks first, then every run that has no result yet; interrupted, it goes on where it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfactor_peft.errors import XFactorError

from . import store
from .ledger import Ledger
from .models import made_models, real_weights
from .plan import Batch, Run, plan
from .presets import Preset
from .process import WORKER, Environment, run_batch
from .progress import Display, Durations
from .provenance import provenance

MANIFEST = "benchmark.json"


@dataclass(frozen=True)
class Options:
    """Where and on what a preset runs; `retry` runs failed arms again, `offline` forbids looking for real weights."""

    folder: Path
    model: str = "demo"
    device: str = "auto"
    threads: int = 1
    retry: bool = False
    offline: bool = False
    worker: tuple[str, ...] = WORKER


def run_preset(preset: Preset, options: Options) -> None:
    """Run what is missing of `preset` in `options.folder`; every run leaves a JSON file in its folder `runs`.

    Raises:
        XFactorError: a correctness check fails (nothing is timed then), or a model cannot be had.
    """
    real, note = real_weights(offline=options.offline) if preset.real else (None, "not part of this preset")
    folders = made_models(options.model, preset.shape if preset.shape_arms else None)
    batches = plan(preset, options.model, real)
    runs = [run for batch in batches for run in batch]
    manifest = {"preset": preset.name, "model": options.model, "real_weights": real, "real_weights_note": note}
    store.write(options.folder / MANIFEST, {**manifest, "files": [run.file for run in runs], **provenance()})
    environment = Environment(options.folder, folders, options.device, options.threads, options.worker)
    checks = check_first(environment, options.model)
    ledger = Ledger(options.folder, checks["model"], options.threads, options.retry)
    durations, todo = Durations(), []
    for run in runs:
        record = ledger.finished(run)
        if record is None:
            todo.append(run)
        elif "wall" in record:
            durations.add(run, record["wall"])
    with Display(todo, len(runs) - len(todo), durations) as display:
        done = len(runs) - len(todo)
        display.say(f"{len(checks['checks'])} correctness checks passed; {done} runs are done, {len(todo)} to go")
        for batch in batches:
            run_missing(environment, ledger, batch, display)


def check_first(environment: Environment, model: str) -> dict[str, Any]:
    """Run the correctness checks in a process of their own; returns their record.

    Raises:
        XFactorError: one fails, or they did not get through.
    """
    file = environment.folder / store.CHECKS
    file.unlink(missing_ok=True)
    try:
        run_batch(environment, [], lambda run, event: None, log="checks.log", checks=(model, file))
    except RuntimeError as error:
        raise XFactorError(str(error)) from error
    record = store.read(file)
    require_checks(record)
    return record


def require_checks(record: dict[str, Any] | None) -> None:
    """Raises XFactorError unless every correctness check has passed."""
    if record is None:
        raise XFactorError("there is no result of the correctness checks, so no figure is shown; run benchmarks/run.sh")
    failed = [check for check in record["checks"] if not check["ok"]]
    if failed:
        words = "; ".join(f"{c['name']}: relative error {c['error']:.2g}, limit {c['limit']:g}" for c in failed)
        raise XFactorError(f"a correctness check failed, so nothing is timed and no figure shown: {words}")


def run_missing(environment: Environment, ledger: Ledger, batch: Batch, display: Display) -> None:
    """Run what a batch lacks, in one process. An arm whose sweep failed gets its row at once."""
    missing: dict[Run, Run] = {}
    for run in batch:
        if ledger.finished(run):
            continue
        ready, file = ledger.ready(run), ledger.file(run)
        file.unlink(missing_ok=True)
        if ready.group == "train" and ready.lr is None:
            store.write(file, without_rate(run, ledger.sweep(run)))
            display.finished(run, store.read(file))
        else:
            missing[ready] = run

    def on_event(run: Run, event: dict[str, Any]) -> None:
        display.update(run, event)
        if event["event"] == "done":
            display.finished(missing[run], store.read(ledger.file(run)))

    if missing:
        log = next(iter(missing)).file.replace(".json", ".log")
        run_batch(environment, [(run, ledger.file(run)) for run in missing], on_event, log=log)


def without_rate(run: Run, sweep: dict[str, Any] | None) -> dict[str, Any]:
    """The row of an arm whose sweep found no learning rate."""
    reason = sweep["error"] if sweep else "it has no result"
    error = f"no learning rate: the sweep failed ({reason})"
    return {"status": "failed", "error": error, "label": run.label, "spec": run.spec(), **provenance()}
