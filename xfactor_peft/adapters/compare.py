"""Two adapters side by side: where their settings differ, and how alike their updates are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .adapter import AdapterInfo
from .catalogue import facts
from .factors import Factors, read_all


@dataclass(frozen=True)
class Comparison:
    """Two adapters side by side.

    Attributes:
        settings: label -> the two values, where they differ.
        layers: name -> Frobenius norms of both updates and their cosine; a norm is 0 for an adapter without the layer.
        cosine: of the updates as a whole, <D1, D2> / (|D1| |D2|) over all layers.
    """

    settings: dict[str, tuple[Any, Any]]
    layers: dict[str, tuple[float, float, float]]
    cosine: float


def compare(first: AdapterInfo, second: AdapterInfo) -> Comparison:
    """Settings and updates; a product <s B A, s' B' A'> = s s' tr((A' A^T)(B^T B')) never makes a whole matrix."""
    one, two = facts(first), facts(second)
    skipped = {"folder", "created", "sha256"}
    settings = {
        label: (one.get(label), two.get(label))
        for label in dict.fromkeys([*one, *two])
        if label not in skipped and one.get(label) != two.get(label)
    }
    parts, layers, sums = read_all([first, second]), {}, [0.0, 0.0, 0.0]
    for name in sorted({*parts[0], *parts[1]}):
        mine, other = (part.get(name) for part in parts)
        products = (_inner(mine, mine), _inner(other, other), _inner(mine, other))
        sums = [total + value for total, value in zip(sums, products, strict=True)]
        norms = [math.sqrt(max(0.0, product)) for product in products[:2]]
        layers[name] = (norms[0], norms[1], _cosine(*products))
    return Comparison(settings, layers, _cosine(*sums))


def _inner(one: Factors | None, two: Factors | None) -> float:
    """In float64: where parts of an update cancel, what is left of its product with itself may round to below 0."""
    if one is None or two is None:
        return 0.0
    product = ((two.a.double() @ one.a.double().T) * (two.b.double().T @ one.b.double())).sum()
    if one.bias is not None and two.bias is not None:
        product += one.bias.double() @ two.bias.double()
    return float(product) * one.scaling * two.scaling


def _cosine(first: float, second: float, inner: float) -> float:
    return inner / math.sqrt(first * second) if min(first, second) > 0 else 0.0
