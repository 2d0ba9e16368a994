"""The loop: checks first, then every run that has no result yet; interrupted, it continues where it was."""

from __future__ import annotations

from dataclasses import dataclass, replace

from xfactor_peft.errors import XFactorError

from .. import process, store
from ..process import Job, Place
from ..session import Session
from ..store import Record, provenance
from .models import made_models, pretrained, real_weights
from .plan import Run, plan
from .presets import Preset, RealPlan

MANIFEST, CHECKS = "benchmark.json", "checks.json"
FINGERPRINTS = ("config", "weights", "tokenizer")


@dataclass(frozen=True)
class Ledger:
    """Which runs are done: same settings, weights and threads, and not a failure that is to be tried again.

    `model` is the main model's record: results on it count only while its fingerprints stay the same.
    """

    place: Place
    model: Record
    retry: bool = False

    def record(self, run: Run) -> Record | None:
        return store.read(self.place.folder / run.job().file)

    def sweep(self, run: Run) -> Record | None:
        """The record of the sweep that a "train" run takes its learning rate from."""
        return self.record(replace(run, group="sweep")) if run.group == "train" else None

    def ready(self, run: Run) -> Run:
        """The run with its learning rate, as far as that is known."""
        sweep = self.sweep(run)
        return replace(run, lr=sweep["lr"]) if sweep and sweep["status"] == "ok" else run

    def finished(self, run: Run) -> Record | None:
        """The record of a run that need not be run again, else None."""
        record = self.record(run)
        if record is None or record.get("spec") != self.ready(run).spec():
            return None
        if record["status"] != "ok":
            return None if self.retry else record
        if record["hardware"]["threads"] != self.place.threads:
            return None
        same = all(record["model"][key] == self.model[key] for key in FINGERPRINTS)
        return record if same or run.model != self.model["name"] else None


def run_preset(
    preset: Preset, place: Place, model: str, *, device: str = "auto", retry: bool = False, offline: bool = False,
    only: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Run what is missing of `preset` in `place.folder`; every run leaves a JSON file in its folder `runs`.

    Args:
        model: what the arms are trained on.
        retry: run failed arms again.
        only: run no more than what has one of these in its file's name, in their order.
        offline: do not look for real weights on the Hub.

    Raises:
        XFactorError: a correctness check fails (nothing is timed then), or a model cannot be had.
    """
    real, note = real_weights(offline=offline) if preset.real else (None, "not part of this preset")
    folders = made_models(model, preset.shape if preset.shape_arms else None)
    fetched = pretrained() if preset.pretrained != RealPlan() else {}
    folders |= fetched
    place = replace(place, given={"folders": folders, "device": device})
    runs = plan(preset, model, real, next(iter(fetched), None))
    manifest = {"preset": preset.name, "model": model, "real_weights": real, "real_weights_note": note}
    store.write(place.folder / MANIFEST, {**manifest, "files": [run.file for run in runs], **provenance()})
    checks = checked(place, model)
    if only:
        runs = [run for text in only for run in runs if text in run.file]
    ledger = Ledger(place, checks["model"], retry)
    done = {run: record for run in runs if (record := ledger.finished(run))}
    waiting = [run.kind for run in runs if run not in done]
    session = Session(place, waiting, [(run.kind, record["wall"]) for run, record in done.items() if "wall" in record])
    session.say(f"{len(checks['checks'])} correctness checks passed; {len(done)} runs are done, {len(waiting)} to go")
    for run in runs:
        if ledger.finished(run) is None:
            run_one(ledger.ready(run), ledger, session)


def checked(place: Place, model: str) -> Record:
    """The correctness checks' record: as it lies there if this very commit has passed them, else from running them.

    Raises:
        XFactorError: one fails.
    """
    job, now = Job(CHECKS, "checks", "training.checks:run_checks", {"model": model}), provenance()
    old = store.read(place.folder / CHECKS) or {}
    same = all(old.get(key) == now[key] for key in ("commit", "dirty", "versions")) and old.get("spec") == job.spec
    record = old if same and old.get("ok") and now["dirty"] is False else process.run(job, place)
    require_checks(record)
    return record


def run_one(run: Run, ledger: Ledger, session: Session) -> None:
    """Run it; an arm whose sweep found no learning rate gets its record at once."""
    if run.group != "train" or run.lr is not None:
        session.run(run.job())
        return
    error = f"no learning rate: the sweep failed ({(ledger.sweep(run) or {}).get('error', 'it has no result')})"
    record = {"status": "failed", "error": error, "label": run.label, "spec": run.spec(), **provenance()}
    store.write(session.place.folder / run.job().file, record)
    session.finished(run.job(), record)


def require_checks(record: Record | None) -> None:
    """Raises XFactorError unless every correctness check has passed."""
    if record is None:
        raise XFactorError("there is no result of the correctness checks, so no figure is shown; run benchmarks/run.sh")
    if "checks" not in record:
        raise XFactorError(f"the correctness checks did not finish, so no figure is shown: {record['error']}")
    failed = [check for check in record["checks"] if not check["ok"]]
    if failed:
        words = "; ".join(f"{c['name']}: relative error {c['error']:.2g}, limit {c['limit']:g}" for c in failed)
        raise XFactorError(f"a correctness check failed, so nothing is timed and no figure shown: {words}")
