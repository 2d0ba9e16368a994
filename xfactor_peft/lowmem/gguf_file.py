"""The header of a GGUF file: its fields, and where each tensor lies. Strict, and quick for vocabularies of any size.

`gguf.GGUFReader` makes an array of every string: 2 seconds and 160 MiB for a vocabulary of 49,152, and it runs on for
ever with a damaged count. Here every length is held against the file's before anything is read. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from .gguf_formats import FORMATS, Format

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST = 4
_FIELDS = 24
"""Where the fields begin: behind the magic, the version and the two counts."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor in a file, still packed.

    Attributes:
        shape: as in torch, rows first (the file has them last).
        data: its bytes, uint8 (rows, bytes of a row), mapped from the file.
    """

    name: str
    form: Format
    shape: tuple[int, ...]
    data: torch.Tensor

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor in `dtype`; for vectors and small matrices."""
        return self.form.unpack_into(torch.empty(self.shape, dtype=dtype).view(len(self.data), -1), self.data).view(
            self.shape
        )


@dataclass(frozen=True)
class GgufFile:
    """Fields and tensors of a file by name.

    Attributes:
        header: the bytes of the fields as they are in the file.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, PackedTensor]
    header: bytes

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))


class _Cursor:
    """Reads little-endian values one after the other; never beyond the end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.place:
            raise ValueError("the file ends within its header")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > _DEEPEST:
            raise ValueError(f"a field is of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > len(self.data):
            raise ValueError("a field is longer than the file")
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner]}"
            return list(struct.unpack(form, self.take(struct.calcsize(form))))
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_gguf(path: Path) -> GgufFile:
    """Read the header and map the tensors.

    Raises:
        ValueError: it is no GGUF file of version 2 or 3, it is damaged, or a tensor is of a type not in `FORMATS`.
    """
    size = path.stat().st_size
    if size < _FIELDS:
        raise ValueError(f"{path} is no GGUF file: it is too short")
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    cursor = _Cursor(memoryview(mapped.numpy().data))
    magic, version = bytes(cursor.take(4)), cursor.number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"{path} is no GGUF file of version 2 or 3 with little-endian numbers")
    try:
        return _read(path, mapped, cursor)
    except (ValueError, struct.error, OverflowError) as error:
        raise ValueError(f"{path} is damaged or not supported: {error}") from error


def _read(path: Path, mapped: torch.Tensor, cursor: _Cursor) -> GgufFile:
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        name = cursor.text()
        if name in fields:
            raise ValueError(f"the field {name!r} comes twice")
        fields[name] = cursor.value(cursor.number("I"))
    header = bytes(cursor.data[_FIELDS : cursor.place])
    places = []
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        places.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.place // alignment) * alignment
    tensors: dict[str, PackedTensor] = {}
    expected = 0
    for name, shape, kind, offset in places:
        if name in tensors:
            raise ValueError(f"the tensor {name!r} comes twice")
        if offset != expected:  # tensors lie one behind the other, so that none is read in another's place
            raise ValueError(f"{name!r} lies at {offset}, not at {expected}, behind the tensor before it")
        tensors[name] = _tensor(mapped, name, shape, kind, start + offset)
        expected += -(-tensors[name].data.numel() // alignment) * alignment
    if left := max(0, len(mapped) - start - expected):  # as if a tensor were missing in the header
        raise ValueError(f"{left} bytes behind the last tensor belong to none")
    return GgufFile(path, fields, tensors, header)


def _tensor(mapped: torch.Tensor, name: str, shape: tuple[int, ...], kind: int, start: int) -> PackedTensor:
    form = FORMATS.get(kind)
    if form is None:
        known = ", ".join(known.name for known in FORMATS.values())
        raise ValueError(f"{name!r} is of ggml's type {kind}; the types read here are {known}")
    rows, row = prod(shape[:-1]), form.row_bytes(shape[-1])
    if not all(shape) or start + rows * row > len(mapped):
        raise ValueError(f"{name!r}, {form.name} {shape}, lies outside the file")
    return PackedTensor(name, form, shape, mapped[start : start + rows * row].view(rows, row))
