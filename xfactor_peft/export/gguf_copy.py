"""A GGUF file again, with some tensors replaced: fields and all other tensors are the same bytes."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..errors import XFactorError
from ..lowmem.gguf_file import GgufFile, PackedTensor
from ..lowmem.gguf_formats import FORMATS, Format
from .optional import need

_NUMBERS = {form.name: number for number, form in FORMATS.items()}


def copy_gguf(source: GgufFile, output: Path, changed: Mapping[str, PackedTensor]) -> None:
    """Write `source` with the tensors of `changed` in place of those of the same names, new ones behind them."""
    tensors = [*({**source.tensors, **changed}.values())]
    alignment = source.fields.get("general.alignment", 32)

    def padding(place: int) -> bytes:
        return bytes(-place % alignment)

    infos, offset = b"", 0
    for tensor in tensors:
        name = tensor.name.encode()
        infos += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape))
        infos += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        infos += struct.pack("<IQ", _NUMBERS[tensor.form.name], offset)
        offset += tensor.data.numel() + len(padding(tensor.data.numel()))
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(source.fields)) + source.header + infos
    with output.open("wb") as file:
        file.write(start + padding(len(start)))
        for tensor in tensors:
            file.write(tensor.data.contiguous().numpy().data)
            file.write(padding(tensor.data.numel()))


def packed(tensor: PackedTensor, values: torch.Tensor, form: Format) -> PackedTensor:
    """`tensor` with other `values`, float32 of its shape, packed as `form`.

    Raises:
        XFactorError: a package that packs this form is missing, or rows are not whole blocks of it.
    """
    return replace(tensor, form=form, data=_pack(values.contiguous(), form))


def _pack(values: torch.Tensor, form: Format) -> torch.Tensor:
    """(rows, columns) float32 -> (rows, bytes of a row) uint8."""
    rows = values.reshape(-1, values.shape[-1])
    size = form.row_bytes(rows.shape[1])
    if form.plain is not None:
        return rows.to(form.plain).view(torch.uint8)
    if form.name.endswith("_K"):
        return _pack_by_ggml(rows, form, size)
    need("gguf", "gguf")
    import gguf

    done = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType[form.name])
    return torch.from_numpy(np.ascontiguousarray(done)).view(len(rows), size)


def _pack_by_ggml(rows: torch.Tensor, form: Format, size: int) -> torch.Tensor:
    """The K formats, which gguf only unpacks, by llama.cpp's own function."""
    need("xllamacpp", "serve")
    import xllamacpp

    try:
        quantize = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise XFactorError(f"this build of xllamacpp does not write {form.name}; pack as F16 instead") from error
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes, quantize.restype = (
        [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer],
        ctypes.c_size_t,
    )
    data = torch.empty(len(rows), size, dtype=torch.uint8)
    written = quantize(_NUMBERS[form.name], rows.data_ptr(), data.data_ptr(), 0, *rows.shape, None)
    assert written == data.numel()
    return data
