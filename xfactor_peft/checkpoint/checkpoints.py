"""Checkpoints of a run in a folder: whole ones only, the newest two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import OutOfRoom
from .durable import file_hash, write_atomically

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole: the number of steps made, and what is known of the run besides its state."""

    step: int
    facts: dict[str, Any]
    path: Path

    def state(self) -> dict[str, Any]:
        """What `Checkpoints.save` was given, read anew."""
        return _load(self.path)["state"]


class Checkpoints:
    """A folder of files `step-N.SHA256.pt`.

    Each is written beside its place and named when it is whole, and its name holds its content's SHA-256. So one that
    a crash, a full disk or a bad sector has damaged is recognised, and the one before it is used. The files are read
    with torch's restricted unpickler, which makes tensors and plain values and runs nothing.

    Attributes:
        saved: the newest step that was saved or found; None without one.
        damaged: what `latest` passed over, and why.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.saved: int | None = None
        self.damaged: list[str] = []

    def save(self, step: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write a checkpoint of tensors and plain values, then remove all but the newest `keep`.

        Raises:
            OutOfRoom: it cannot be written; those before it stay.
        """
        content = {"format": FORMAT, "step": step, "facts": facts, "state": state}
        path = self.folder / f"step-{step:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = write_atomically(path, lambda file: torch.save(content, file), hashed=True)
        except (OSError, RuntimeError) as error:
            last = "no checkpoint is there yet" if self.saved is None else f"the last whole one is of step {self.saved}"
            reason = getattr(error, "strerror", None) or str(error)
            raise OutOfRoom(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({reason}); {last}"
            ) from error
        self.saved = step
        of_other_steps = [old for old in self._files() if old.name.split(".")[0] != path.name.split(".")[0]]
        for old in {*self._files()} - {path, *of_other_steps[1 - self.keep :]}:
            old.unlink()

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None."""
        self.damaged = []
        for path in reversed(self._files()):
            try:
                found = _read(path)
            except Exception as error:  # whatever torch makes of a file of somebody else's
                self.damaged.append(f"{path.stem}: {error}")
                continue
            self.saved = found.step
            return found
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))


def _read(path: Path) -> Checkpoint:
    if file_hash(path) != path.stem.rpartition(".")[2]:
        raise ValueError("it is damaged")
    content = _load(path, mmap=True)  # of the state, no more than its description
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, which this version does not read")
    return Checkpoint(content["step"], content["facts"], path)


def _load(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
