"""The hidden folder of a run under way: `.NAME.partial` beside its output, which takes its name when all is done.

settings.json      what the caller wants to find again
metrics.jsonl      a line with the model, the token set and the settings, then a line a step
checkpoints/       see `checkpoints`; gone, like the first, when the record is complete
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..adapters.files import RECORD, SETTINGS
from ..adapters.output import check_replaceable, empty_folder, publish, staging_of, writing
from ..checkpoint.checkpoints import Checkpoint, Checkpoints
from ..checkpoint.durable import write_atomically
from ..checkpoint.interruption import Interrupted
from ..checkpoint.state import Step, steps_of
from ..errors import OutOfRoom, XFactorError
from ..training.train import TrainResult
from .save_result import complete_record, save_result

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
_VOLATILE = ("why", "name")
"""What of a base's record may change between two parts of a run: where its files were found."""


@dataclass
class RunFolder:
    """A run's staging folder, new or found again.

    Attributes:
        start: the checkpoint to resume from, None for a run from its first step.
        record: what was written with the adapter, once it is.
    """

    output: Path
    path: Path
    header: dict[str, Any]
    checkpoints: Checkpoints
    start: Checkpoint | None = None
    record: dict[str, Any] | None = None

    @classmethod
    def open(
        cls, output: Path, header: dict[str, Any], *, force: bool, resume: bool, settings: dict[str, Any]
    ) -> RunFolder:
        """A new folder, or with `resume` the one that is there; raises XFactorError where that cannot be."""
        path = staging_of(output)
        if resume:
            found = _unfinished(output)
            header = _checked_header(output, found, header)
            if found != path:  # published, but not measured: it has its hidden name again until it is
                os.replace(found, path)
            checkpoints = Checkpoints(path / CHECKPOINTS)
            return cls(output, path, header, checkpoints, checkpoints.latest())
        check_output(output, force=force)
        run = cls(output, empty_folder(path), header, Checkpoints(path / CHECKPOINTS))
        try:
            write_atomically(path / SETTINGS, json.dumps(settings, indent=2).encode())
            write_atomically(path / METRICS, _line(header))
        except OSError as error:
            raise XFactorError(
                f"{path} cannot be written ({error.strerror}); free space, or choose another `output`"
            ) from error
        return run

    @contextmanager
    def log(self) -> Iterator[Callable[[Step], None]]:
        """A function that adds a step to `metrics.jsonl`, which first loses what came after the checkpoint."""
        steps = steps_of(self.start.state()["history"]) if self.start else []
        write_atomically(self.path / METRICS, b"".join([_line(self.header), *(_line(asdict(step)) for step in steps)]))
        with (self.path / METRICS).open("ab") as file:

            def write(step: Step) -> None:
                try:
                    file.write(_line(asdict(step)))
                    file.flush()
                except OSError as error:
                    raise OutOfRoom(f"{self.path / METRICS} cannot be written ({error.strerror})") from error

            yield write

    def publish(self, result: TrainResult) -> None:
        """Save the trained adapter and give the folder its name; only scores are missing from its record.

        What a run resumes with stays until `complete`, where it is anything: with `fsdp` nothing is saved.
        """
        with writing(self.output, f"what there is stays in {self.path}"):
            self.record = save_result(result, self.path, self.output.name)
            publish(self.path, self.output)
        if self.checkpoints.saved is None:
            _tidy(self.output)

    def complete(self, result: TrainResult) -> dict[str, Any]:
        """Put what was measured after `publish` into the record; returns it."""
        assert self.record is not None  # published
        with writing(self.output, "the adapter itself is whole"):
            record = complete_record(result, self.output, self.record)
        _tidy(self.output)
        return record

    def with_resume_hint(self, stopped: Interrupted) -> Interrupted:
        """The signal, with what was saved and how to resume; the folder of a run that kept nothing is removed."""
        saved = self.checkpoints.saved
        if self.record is not None:
            then = "start again with `force=True` for them" if saved is None else "resume with `resume=True`"
            return Interrupted(
                f"stopped; the adapter is whole in {self.output}, its scores are not; {then}", stopped.status - 128
            )
        if saved is None:
            shutil.rmtree(self.path, ignore_errors=True)
            return Interrupted("stopped; nothing was saved, start again with the same command", stopped.status - 128)
        if "`resume=True`" in str(stopped):
            return stopped
        return Interrupted(f"stopped; step {saved} is saved; resume with `resume=True`", stopped.status - 128)

    def discard_if_empty(self, error: XFactorError) -> None:
        """Remove the folder of a run that failed before its first step, unless what it saved can be resumed."""
        if isinstance(error, OutOfRoom) and self.checkpoints.saved is not None:
            return
        with suppress(OSError):
            if self.record is None and self.start is None and len((self.path / METRICS).read_bytes().splitlines()) == 1:
                shutil.rmtree(self.path)


def check_output(output: Path, *, force: bool) -> None:
    """Raises XFactorError where a new run could not be written: before anything is loaded."""
    path = staging_of(output)
    found = Checkpoints(path / CHECKPOINTS).latest()
    if found and not force:
        raise XFactorError(
            f"an interrupted run is in {path}, at step {found.step}; resume it with `resume=True`, "
            "or start again with `force=True`"
        )
    check_replaceable(output, force=force)


def interrupted_settings(output: Path) -> dict[str, Any]:
    """The `settings.json` of an interrupted run, whose folder stays where it is.

    Raises:
        XFactorError: there is no interrupted run at `output`.
    """
    path = _unfinished(output)
    if not (path / SETTINGS).is_file():
        if not (output / RECORD).is_file():
            raise XFactorError(f"{output} cannot be resumed: there is no interrupted run")
        _tidy(output)  # the run may have been killed while it did so itself
        raise XFactorError(f"{output} cannot be resumed: the run is finished, there is nothing to resume")
    try:
        value = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise XFactorError(f"{output} cannot be resumed: {path / SETTINGS} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise XFactorError(f"{output} cannot be resumed: {path / SETTINGS} must hold a JSON object")
    return value


def _unfinished(output: Path) -> Path:
    """Where an interrupted run is, if there is one: its hidden folder, or `output` if only its scores are missing.

    Raises:
        XFactorError: something was put at `output` since the run began; what was there before, it was told to replace.
    """
    path = staging_of(output)
    if (output / SETTINGS).is_file() and (output / METRICS).is_file() and not path.exists():
        return output
    begun = path / SETTINGS
    if begun.is_file() and output.exists() and output.stat().st_ctime > begun.stat().st_mtime:
        raise XFactorError(
            f"{output} cannot be resumed: what is there now came after the run in {path}, which would replace it; "
            "give it another name first"
        )
    return path


def _tidy(output: Path) -> None:
    """Remove what a finished run no longer needs."""
    (output / SETTINGS).unlink(missing_ok=True)
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)


def _checked_header(output: Path, path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The header that the run began with, when it says the same as this one."""
    try:
        with (path / METRICS).open("rb") as file:
            kept = json.loads(file.readline())
    except FileNotFoundError as error:
        raise XFactorError(f"{output} cannot be resumed: there is no interrupted run") from error
    except ValueError as error:
        raise XFactorError(f"{output} cannot be resumed: {path / METRICS} is damaged: {error}") from error
    now = json.loads(_line(header))
    for part in now:
        old, new = kept.get(part) or {}, now[part] or {}
        changed = [k for k in {**old, **new} if k not in _VOLATILE and old.get(k) != new.get(k)]
        if changed:
            raise XFactorError(f"{output} cannot be resumed: the run has another {part} ({', '.join(sorted(changed))})")
    return kept


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
