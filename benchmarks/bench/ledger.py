"""Which runs are done: same settings, same weights, same threads, and not a failure that is to be tried again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import store
from .plan import Run

FINGERPRINTS = ("config", "weights", "tokenizer")


@dataclass(frozen=True)
class Ledger:
    """The results in `folder`, seen from a benchmark that is about to run.

    Attributes:
        model: record of the main model, whose results count only while its fingerprints stay the same.
        threads: CPU threads; results with another number are measured anew.
        retry: failures do not count as done.
    """

    folder: Path
    model: dict[str, Any]
    threads: int
    retry: bool = False

    def file(self, run: Run) -> Path:
        return self.folder / store.RUNS / run.file

    def ready(self, run: Run) -> Run:
        """A "train" run with the learning rate that its arm's sweep chose, once it did; others as they are."""
        if run.group != "train":
            return run
        sweep = self.sweep(run)
        return replace(run, lr=sweep["lr"]) if sweep and sweep["status"] == "ok" else run

    def sweep(self, run: Run) -> dict[str, Any] | None:
        """The record of the sweep that belongs to a "train" run."""
        return store.read(self.file(replace(run, group="sweep")))

    def finished(self, run: Run) -> dict[str, Any] | None:
        """The record of a run that need not be run again, else None."""
        run = self.ready(run)
        record = store.read(self.file(run))
        if record is None or record.get("spec") != run.spec():
            return None
        if record["status"] != "ok":
            return None if self.retry else record
        if record["hardware"]["threads"] != self.threads:
            return None
        same = all(record["model"][key] == self.model[key] for key in FINGERPRINTS)
        return record if same or run.model != self.model["name"] else None
