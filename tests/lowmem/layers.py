"""Frozen weights of every kind with their exact values, and what the tests measure on a layer."""

from __future__ import annotations

import torch

from xfactor_peft.lowmem.int8 import Int8Linear
from xfactor_peft.lowmem.nf4 import NF4Linear
from xfactor_peft.lowmem.peft_layers import PlainWeight
from xfactor_peft.lowmem.scratch import _pool

SHAPES = [(7, 13), (507, 13), (13, 507), (64, 128)]


def make(kind: str, out_features: int, in_features: int, dtype: torch.dtype, seed: int = 0):
    """A frozen weight and its exact value (out, in) in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    if kind == "int8":
        layer = Int8Linear.from_weight(weight, None)
        return layer, layer.dequantize(torch.float64)
    if kind == "nf4":
        layer = NF4Linear.from_weight(weight, None)
        return layer, layer.dequantize(torch.float64)
    weight = weight.to(dtype)
    stored = weight.T.contiguous() if kind == "conv1d" else weight
    return PlainWeight(stored, transposed=kind == "conv1d"), weight.double()


def scratch_bytes() -> int:
    """Bytes held by this thread's scratch buffers."""
    return sum(buffer.nbytes for buffer in _pool().values())


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


def saved_bytes(function) -> int:
    """Bytes that a call keeps for backward, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address repeats
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in storages.values())
