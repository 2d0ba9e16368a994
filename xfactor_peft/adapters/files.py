"""Read an adapter's files as if a stranger had made them: bounded, inside their folder, and nothing that runs code."""

from __future__ import annotations

import json
import stat
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint.durable import write_atomically
from ..errors import XFactorError

RECORD, CARD = "xfactor.json", "README.md"
SETTINGS = "settings.json"
"""Of a run that is not finished, beside what it saved."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's own names."""
JSON_LIMIT = 16 * 2**20
HEADER_LIMIT = 16 * 2**20
"""Bytes; a thousand layers of LoRA take a fiftieth of it."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
COMPUTED = (torch.float32, torch.bfloat16)
"""What weights are converted to when they are used."""
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


def inside(path: Path) -> Path:
    """The path, when it is a plain file that lies in its folder.

    A link may lead to another file of the folder, or, in a snapshot of the Hub's cache and the folders in it, to that
    repository's own blobs.

    Raises:
        XFactorError: it is missing, leads out of the folder, or is a device, a pipe or a folder.
    """
    try:
        target, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise XFactorError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    roots = [folder]
    for place in (folder, *folder.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and (place == folder or repository.name.startswith("models--")):
            roots.append(repository / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise XFactorError(f"{path} is a link that leads out of its folder; put the file itself there")
    if not stat.S_ISREG(mode):
        raise XFactorError(f"{path} is not a plain file")
    return target


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises XFactorError for anything else."""
    try:
        target = inside(path)
        if target.stat().st_size > JSON_LIMIT:
            raise XFactorError(f"{path} is larger than {JSON_LIMIT >> 20} MiB")
        value = json.loads(target.read_text(encoding="utf-8"))
    except XFactorError:
        raise
    except (OSError, RecursionError, ValueError) as error:
        raise XFactorError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise XFactorError(f"{path} must hold a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented, for people too; in one step."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape by name of a file of floating-point tensors, all of which are looked at.

    Raises:
        XFactorError: pickled weights, a file that is cut off or no safetensors, another dtype, NaN or infinity.
    """
    pickle = next((name for name in _PICKLES if (path.parent / name).exists()), None)
    if pickle and not path.exists():
        raise XFactorError(
            f"{path.parent / pickle} is a pickle, which can run any code and is not loaded; convert it to safetensors"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        target = inside(path)
        _check_header(target, path)
        with safe_open(target, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(key)
                _check_tensor(path, key, tensor)
                shapes[key] = tuple(tensor.shape)
    except XFactorError:
        raise
    except (OSError, SafetensorError, RuntimeError, TypeError, OverflowError, ValueError) as error:
        raise XFactorError(f"{path} cannot be read as safetensors: {error}") from error
    if not shapes:
        raise XFactorError(f"{path} holds no tensor")
    return shapes


def _check_header(target: Path, path: Path) -> None:
    """The length that the file gives for its header, before anything is allocated for it."""
    size = target.stat().st_size
    with target.open("rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > min(HEADER_LIMIT, size - 8):
        raise XFactorError(f"{path} cannot be read as safetensors: a header of {length} bytes in a file of {size}")


def _check_tensor(path: Path, key: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise XFactorError(f"{path}: {key} holds {tensor.dtype}; adapters are float32, float16 or bfloat16")
    if not torch.isfinite(tensor).all():
        raise XFactorError(f"{path}: {key} holds NaN or infinity; train the adapter again")
    for dtype in COMPUTED:
        if not torch.isfinite(tensor.to(dtype)).all():
            raise XFactorError(
                f"{path}: {key} holds {tensor.abs().max():g}, infinity in {str(dtype).removeprefix('torch.')}, in "
                "which adapters are used; train the adapter again"
            )
