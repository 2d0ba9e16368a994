"""Which base model is this? What is kept of it, and what of two makes them the same; `fingerprints` takes it."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

QUANTISED_COSINE = 0.95
"""Least cosine of two quantisations of the same weights; four bits of normal ones have 0.993, three about 0.97."""


@dataclass(frozen=True)
class BaseIdentity:
    """Name and fingerprints of a base model, stored with every adapter made for it.

    Attributes:
        name: Hub id, folder or "demo", as the user knows it; for people, never compared.
        revision: commit on the Hub, or None for a folder.
        architecture: e.g. "GPT2LMHeadModel".
        shape: "layers x width, vocabulary", for messages.
        config: SHA-256 of the parts of config.json that matter.
        weights: SHA-256 of every tensor's name, shape and leading values in the files.
        tokenizer: SHA-256 of the vocabulary.
        parsed: SHA-256 of what transformers makes of config.json, where that is not the default: the same for every
            layout of the file. None in records from before it was kept.
        forward: as `weights`, of the tensors that the forward pass uses and no others: an output embedding of its own
            counts, stored masks and frequencies do not. None in records from before it was kept.
        sketch: of a GGUF file, what every quantisation of a model has alike (see `sketch_of`); None otherwise.
    """

    name: str
    revision: str | None
    architecture: str
    shape: str
    config: str
    weights: str
    tokenizer: str
    parsed: str | None = None
    forward: str | None = None
    sketch: str | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: BaseIdentity) -> list[str]:
        """Which of config, weights and tokenizer differ; empty when an adapter fits.

        Configurations are the same by their text or by their meaning (which a newer transformers may see otherwise).
        Weights are compared by what the forward pass uses, and by the older fingerprint where one side has no other;
        another quantisation of the same weights is no difference (see `requantised`).
        """
        config = self.config == other.config or (self.parsed is not None and self.parsed == other.parsed)
        both = self.forward is not None and other.forward is not None
        weights = self.forward == other.forward if both else self.weights == other.weights
        weights = weights or self.requantised(other)
        same = {"config": config, "weights": weights, "tokenizer": self.tokenizer == other.tokenizer}
        return [key for key, equal in same.items() if not equal]

    def requantised(self, other: BaseIdentity) -> bool:
        """Whether two GGUF files hold the same weights, quantised in different ways."""
        if not (self.sketch and other.sketch) or self.forward == other.forward:
            return False
        return alike(self.sketch, other.sketch)

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture}, {self.shape}, weights {self.weights[:8]})"


def sketch_of(exact: bytes, values: np.ndarray) -> str:
    """A digest of the vectors, which no quantisation touches, and sampled `values` (n, m) of n matrices, as float16."""
    codes = base64.b64encode(values.astype(np.float16).tobytes()).decode()
    return f"{hashlib.sha256(exact).hexdigest()}:{values.shape[1]}:{codes}"


def alike(one: str, other: str) -> bool:
    """Whether two sketches are of the same weights: vectors are equal, and every matrix's values have a cosine of
    `QUANTISED_COSINE`. Another model's are near 0; a fine-tune's vectors are others, unless only LoRA was merged."""
    try:
        digests, sizes, codes = zip(*(sketch.split(":") for sketch in (one, other)), strict=True)
        first, second = (
            np.frombuffer(base64.b64decode(code), dtype=np.float16).astype(np.float32).reshape(-1, int(sizes[0]))
            for code in codes
        )
    except ValueError:
        return False
    if digests[0] != digests[1] or sizes[0] != sizes[1] or first.shape != second.shape:
        return False
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return bool(((first * second).sum(1) > QUANTISED_COSINE * lengths).all())


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
