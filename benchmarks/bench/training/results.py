"""From JSON files to rows: one row an arm, with every metric as a mean over seeds and its interval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import store
from ..stats import Estimate, over_seeds
from ..store import Record
from .arms import Arm
from .metrics import METRICS
from .models import REAL
from .plan import GROUPS, RUNS
from .runner import CHECKS, MANIFEST, require_checks


@dataclass(frozen=True)
class Row:
    """An arm's runs on a set. `lr` is None where seeds could differ in it, that is for arms with a sweep."""

    group: str
    model: str
    contains: str
    arm: Arm
    lr: float | None
    records: tuple[Record, ...]

    @property
    def good(self) -> list[Record]:
        return [record for record in self.records if record["status"] == "ok"]

    @property
    def failures(self) -> list[Record]:
        return [record for record in self.records if record["status"] != "ok"]

    @property
    def why(self) -> str:
        """What became of the first run that failed."""
        return f"{self.failures[0]['status']}: {self.failures[0]['error']}"

    @property
    def label(self) -> str:
        return self.arm.label + (f", lr {self.lr:g}" if self.lr is not None and self.group == "source" else "")

    @property
    def settings(self) -> Record:
        return self.records[0]["spec"]["settings"]

    @property
    def sample(self) -> Record | None:
        """Its first sample that is not empty, or its first."""
        found = [one for record in self.good[:1] for one in record["samples"]]
        return next((one for one in found if one["tokens"]), found[0] if found else None)

    def values(self, metric: str) -> list[float]:
        found = (METRICS[metric].value(record) for record in self.good)
        return [value for value in found if value is not None]

    def estimate(self, metric: str) -> Estimate | None:
        """Mean over seeds; with one seed, the interval of that run."""
        values = self.values(metric)
        return over_seeds(values, METRICS[metric].interval(self.good[0])) if values else None


@dataclass(frozen=True)
class Results:
    """A folder of results: the manifest, the checks, a row an arm, and the files of runs that are still to be made."""

    folder: Path
    manifest: Record
    checks: Record
    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()

    def of(self, group: str) -> list[Row]:
        return [row for row in self.rows if row.group == group]

    def tables(self, group: str) -> list[list[Row]]:
        """A group's rows, apart by model and letter, the real model's first."""
        rows = self.of(group)
        keys = dict.fromkeys((row.model, row.contains) for row in rows)
        tables = [[row for row in rows if (row.model, row.contains) == key] for key in keys]
        return sorted(tables, key=lambda table: table[0].model != REAL.name)

    def base(self, row: Row) -> Record | None:
        """The untrained model's record that belongs to a row: same model, same token set."""
        for other in self.rows:
            same = other.model == row.model and other.contains == row.contains
            if other.arm.method == "none" and same and other.good:
                return other.good[0]
        return None

    def bias(self, row: Row) -> Record | None:
        """The base's record with an exact logit bias on a row's model and set."""
        found = (other for other in self.of("base") if (other.model, other.contains) == (row.model, row.contains))
        return next((record for other in found for record in other.good), None)

    def floor(self, row: Row) -> float | None:
        """The lowest loss that an arm could reach: 0 when the embedding trains, else the frozen head's."""
        if row.arm.method == "full":
            return 0.0
        return (self.base(row) or {}).get("head_floor" if row.arm.target.endswith("head") else "floor")

    def origin(self) -> str:
        """Machine, versions, commits and date of the benchmark, in one line."""
        versions, hardware = self.manifest["versions"], self.checks["hardware"]
        packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
        threads = f"{hardware['threads']} thread{'s' if hardware['threads'] > 1 else ''}"
        records = [record for row in self.rows for record in row.records]
        commits = {(r["commit"] or "no commit")[:10] + (" (dirty)" if r["dirty"] else "") for r in records}
        place = hardware["gpu"] or f"{hardware['cpu']}, {threads}"
        return f"{place}; {packages}; commit {', '.join(sorted(commits))}; {self.manifest['created'][:10]}"


def load(folder: Path) -> Results:
    """Read a folder; runs that the last benchmark there did not plan are left out.

    Raises:
        XFactorError: the correctness checks have not passed, so that no figure may be shown.
    """
    manifest, checks = store.read(folder / MANIFEST) or {}, store.read(folder / CHECKS)
    require_checks(checks)
    grouped: dict[tuple, list[Record]] = {}
    for record in (store.read(folder / RUNS / name) for name in manifest.get("files", ())):
        if record is not None:
            spec = record["spec"]
            lr = None if spec["group"] == "train" else spec["lr"]
            key = (spec["group"], spec["model"], spec["settings"]["contains"], Arm(**spec["arm"]), lr)
            grouped.setdefault(key, []).append(record)
    rows = [Row(*key, tuple(records)) for key, records in grouped.items()]
    missing = tuple(name for name in manifest.get("files", ()) if not (folder / RUNS / name).is_file())
    return Results(folder, manifest, checks, tuple(sorted(rows, key=lambda row: GROUPS.index(row.group))), missing)
