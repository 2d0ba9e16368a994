"""Checkpoints of a run in a folder: whole ones only, the newest two."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import XFactorError
from .durable import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole: the number of steps made, and what is not a tensor."""

    step: int
    facts: dict[str, Any]
    path: Path

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path)


class Checkpoints:
    """A folder of pairs `step-N.safetensors` and `step-N.json`.

    The JSON file is written last and holds the SHA-256 of the tensors' file and of itself, so a pair that a crash, a
    full disk or a bad sector left incomplete is told from a whole one, and the one before it is used.

    Attributes:
        saved: the newest step that was saved or found; None without one.
        damaged: what `latest` passed over, and why.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.saved: int | None = None
        self.damaged: list[str] = []

    def save(self, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Write a checkpoint, then remove all but the newest `keep`.

        Raises:
            XFactorError: it cannot be written; those before it stay.
        """
        name = f"step-{step:08d}"
        weights = self.folder / f"{name}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(weights, lambda path: save_file(tensors, path))
            body = {"format": FORMAT, "step": step, "sha256": _file_hash(weights), "facts": facts}
            write_atomically(self.folder / f"{name}.json", json.dumps({**body, "digest": _digest(body)}).encode())
        except (OSError, SafetensorError) as error:
            last = "no checkpoint is there yet" if self.saved is None else f"the last whole one is of step {self.saved}"
            reason = getattr(error, "strerror", None) or str(error)
            raise XFactorError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({reason}); {last}"
            ) from error
        self.saved = step
        for old in self._manifests()[: -self.keep]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None."""
        self.damaged = []
        for path in reversed(self._manifests()):
            try:
                found = _read(path)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                self.damaged.append(f"{path.stem}: {error}")
                continue
            self.saved = found.step
            return found
        return None

    def _manifests(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.json"))


def _read(path: Path) -> Checkpoint:
    body = json.loads(path.read_bytes())
    digest = body.pop("digest")
    if digest != _digest(body):
        raise ValueError("its description is damaged")
    if body["format"] != FORMAT:
        raise ValueError(f"format {body['format']}, which this version does not read")
    weights = path.with_suffix(".safetensors")
    if _file_hash(weights) != body["sha256"]:
        raise ValueError("its tensors are damaged")
    return Checkpoint(body["step"], body["facts"], weights)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
