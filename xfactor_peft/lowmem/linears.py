"""Which layers are linear layers, whatever their class is called, and which weights of the blocks are in none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

_BLOCK = re.compile(r"\.\d+\.")


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer computes x W^T + b: an nn.Linear or a Conv1D, or a subclass that was seen to do the same.

    Falcon's layers are a subclass that multiplies by itself; Phi-MoE's router is one that returns something else.
    Quantised layers are not asked: their weights are codes.
    """
    return type(layer) is Conv1D or (isinstance(layer, nn.Linear) and _multiplies(type(layer)))  # type: ignore[arg-type]  # a class has a hash


@cache
def _multiplies(kind: type[nn.Linear]) -> bool:
    if kind.forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator, device="cpu") for shape in ((2, 5, 4), (3, 4), (3,)))
    results = []
    for extra in (bias, None):
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = 4, 3
        layer.weight = nn.Parameter(weight)
        layer.register_parameter("bias", None if extra is None else nn.Parameter(extra))
        try:
            with torch.no_grad():
                results.append(layer(x))
        except Exception:  # whatever a layer of another kind trips over
            return False
    expected = (F.linear(x, weight, bias), F.linear(x, weight))
    return all(
        isinstance(y, torch.Tensor) and y.shape == e.shape and torch.allclose(y, e, atol=1e-5)
        for y, e in zip(results, expected, strict=True)
    )


def below_block(name: str) -> str:
    """The path below the block's number: "transformer.h.3.attn.c_proj" -> "attn.c_proj"."""
    return _BLOCK.split(name, maxsplit=1)[-1]


def in_block(name: str) -> bool:
    """Whether a path leads through a numbered block, as that of an embedding does not."""
    return _BLOCK.search(name) is not None


def other_weights(model: nn.Module, among: type[nn.Module] | tuple[type[nn.Module], ...]) -> Iterator[str]:
    """Names of the blocks' weights of two dimensions or more that are in no layer of the types `among`.

    For example experts that are stacked into one tensor of three dimensions, and routers.
    """
    for path, owner in model.named_modules():
        if isinstance(owner, among):
            continue
        for leaf, parameter in owner.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            if parameter.dim() >= 2 and in_block(name):
                yield name


def counted(names: Iterator[str]) -> dict[str, int]:
    """How many blocks have each, by the path below the block, e.g. {"mlp.experts.down_proj": 24}."""
    return dict(Counter(map(below_block, names)))


def listed(counts: dict[str, int]) -> str:
    """ "mlp.experts.down_proj x 24, mlp.gate.weight x 24"."""
    return ", ".join(f"{name} x {count}" for name, count in counts.items())
