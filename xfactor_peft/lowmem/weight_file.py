"""Frozen weights in a file that is mapped into memory: they are page cache, which the system may take back.

The file is safetensors, so its library maps and reads it. It is written a tensor at a time, each at a multiple of
`ALIGNMENT` bytes (entries that are named `PADDING` fill up), and holds the CRC-32 of its data, since whatever is wrong
with a file that is only mapped would show as numbers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

ALIGNMENT = 64
PADDING = ".padding"
_PIECE = 2**22
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_KEY, _UNKNOWN = "crc32", "0" * 8


def write_weights(
    file: BinaryIO,
    shapes: Mapping[str, torch.Tensor],
    values: Iterable[tuple[str, torch.Tensor]],
    about: Mapping[str, str],
) -> None:
    """Write the tensors `values`, one after the other and none of them kept.

    Args:
        shapes: all of them by name, in this order, on the meta device.
        about: what else the header says, for people and for who looks for a file.

    Raises:
        OSError: the disk is full.
    """
    header = _header(shapes, {**about, _KEY: _UNKNOWN})
    file.write(header)
    crc, place = 0, 0
    for (name, expected), (given, value) in zip(shapes.items(), values, strict=True):
        assert (given, value.shape, value.dtype) == (name, expected.shape, expected.dtype)
        flat = value.detach().contiguous().view(-1).view(torch.uint8)
        for piece in (torch.zeros(-place % ALIGNMENT, dtype=torch.uint8), *flat.split(_PIECE)):
            data = piece.numpy().data
            crc, place = zlib.crc32(data, crc), place + len(data)
            file.write(data)
    file.seek(0)
    file.write(_header(shapes, {**about, _KEY: f"{crc:08x}"}))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors by name, mapped: reading one is what brings it into memory, and nothing ever writes to the file.

    Raises:
        ValueError: the file is not whole, or not one of these.
    """
    try:
        about = describe(path)
        if about.get(_KEY) != f"{_checksum(path):08x}":
            raise ValueError(f"{path} is damaged")
        return {name: value for name, value in load_file(path).items() if not name.startswith(PADDING)}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def describe(path: Path) -> dict[str, str]:
    """What the header says of the file.

    Raises:
        ValueError: it has no such header.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _checksum(path: Path) -> int:
    """Of all that lies behind the header, by plain reads: a map would keep what it looked at."""
    crc, buffer = 0, bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while count := file.readinto(buffer):
            crc = zlib.crc32(memoryview(buffer)[:count], crc)
    return crc


def _header(shapes: Mapping[str, torch.Tensor], about: dict[str, str]) -> bytes:
    """Its length in 8 bytes, then JSON, padded with spaces so that the data begin at a multiple of `ALIGNMENT`."""
    entries: dict[str, object] = {"__metadata__": about}
    place = 0
    for name, tensor in shapes.items():
        if gap := -place % ALIGNMENT:
            entries[f"{PADDING}.{name}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [place, place + gap]}
            place += gap
        stop = place + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, stop]}
        place = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
