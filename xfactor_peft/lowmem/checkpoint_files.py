"""Reading safetensors files piece by piece with plain reads.

A memory map would keep every page that was touched in the resident set until the file is closed, and so would one
read of a whole file; here only the piece that was asked for is ever in memory. The format: 8 bytes with the length
of a JSON header, the header {name: {dtype, shape, data_offsets}}, the data (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch

from .scratch import scratch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DERIVED = (
    (re.compile(r"(^|\.)(attn|attention)\.bias$"), lambda shape: len(shape) == 4 and shape[2] == shape[3]),
    (re.compile(r"(^|\.)(attn|attention)\.masked_bias$"), lambda shape: len(shape) in (0, 4) or shape == (1,)),
    (re.compile(r"rotary_emb\.inv_freq$"), lambda shape: len(shape) == 1),
    (re.compile(r"(^|\.)position_ids$"), lambda shape: len(shape) <= 2),
)
PIECE_BYTES = 8 * 2**20
_LONGEST_HEADER = 100 * 2**20
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file; nothing is read before `pieces` or `read`."""

    file: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a type that is not floating point of 16 to 64 bits."""
        return _DTYPES.get(self.dtype_name)

    def read(self) -> torch.Tensor:
        """The whole tensor, valid until the next read: it lies in a scratch buffer."""
        return next(self.pieces(max(1, self.stop - self.start)))[1]

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, tensor) of at most `piece_bytes` (at least one row); each is valid until the next is asked for."""
        rows = self.shape[0] if self.shape else 1
        row_shape = self.shape[1:]
        dtype = self.dtype
        assert dtype is not None, f"{self.name} is {self.dtype_name}, not floating point"  # callers look first
        row_bytes = prod(row_shape) * dtype.itemsize
        step = max(1, min(rows, piece_bytes // max(1, row_bytes)))
        with self.file.open("rb", buffering=0) as file:
            for first in range(0, rows, step):
                count = min(step, rows - first)
                buffer = scratch("file", (count * row_bytes,), torch.uint8)
                file.seek(self.start + first * row_bytes)
                _fill(file, buffer)
                values = buffer.view(dtype)
                yield slice(first, first + count), values.view((count, *row_shape) if self.shape else ())


def follows_from_config(key: str, tensor: StoredTensor, patterns: Iterable[str] = ()) -> bool:
    """Whether a stored tensor need not be read: causal masks of older checkpoints, frequencies, positions.

    By its name and its shape (an `attn.bias` of one row is a bias), and by `patterns` of the model's class.
    """
    for name, fits in _DERIVED:
        if name.search(key):
            return fits(tensor.shape)
    return any(re.search(pattern, key) for pattern in patterns)


def same_values(left: StoredTensor, right: StoredTensor, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are equal once converted to `dtype`; read piece by piece."""
    if left.shape != right.shape or left.dtype is None or right.dtype is None:
        return False
    width = max(left.dtype.itemsize, right.dtype.itemsize)
    pieces = (t.pieces(PIECE_BYTES * t.dtype.itemsize // width) for t in (left, right) if t.dtype is not None)
    ours, theirs = pieces
    for _, values in ours:
        kept = values.to(dtype, copy=True)  # the next read overwrites them
        if not torch.equal(kept, next(theirs)[1].to(dtype)):
            return False
    return True


def _fill(file: FileIO, buffer: torch.Tensor) -> None:
    view = buffer.numpy().data
    while view:
        count = file.readinto(view)
        if not count:
            raise ValueError(f"{file.name} ends too early; the file is damaged or was not copied whole")
        view = view[count:]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, from model.safetensors or a sharded index.

    Raises:
        ValueError: there are no such files, or one is damaged.
    """
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    index = _json((folder / INDEX).read_bytes(), folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{folder / INDEX} has no weight_map")
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / INDEX} names {name}, which is not a file of that folder")
        found |= {key: tensor for key, tensor in _header(folder / name).items() if weight_map.get(key) == name}
    missing = sorted(weight_map.keys() - found.keys())
    if missing:
        raise ValueError(f"{folder}: the files lack {len(missing)} tensors of the index, such as {missing[0]}")
    return found


def _header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path} is not a safetensors file, or it is damaged")
        header = _json(file.read(length), path)
    header.pop("__metadata__", None)
    result = {}
    for name, entry in header.items():
        try:
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            tensor = StoredTensor(path, name, entry["dtype"], shape, 8 + length + start, 8 + length + stop)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the header entry of {name} is damaged") from error
        expected = None if tensor.dtype is None else prod(shape) * tensor.dtype.itemsize
        if not 0 <= start <= stop <= size - 8 - length or expected not in (None, stop - start):
            raise ValueError(f"{path}: {name} lies outside the file or has the wrong length; the file is damaged")
        result[name] = tensor
    return result


def _json(data: bytes, path: Path) -> dict:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value
