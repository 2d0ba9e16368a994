"""Which base model is this? Fingerprints that do not depend on how the weights were loaded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..lowmem.checkpoint_files import StoredTensor, follows_from_config, same_values, stored_tensors

SAMPLED_VALUES = 256
"""Leading values of every tensor that enter the weights' fingerprint."""

QUANTISED_COSINE = 0.95
"""Least cosine of two quantisations of the same weights; four bits of normal ones have 0.993, three about 0.97."""

# Keys of config.json that change without the function of the model changing.
_VOLATILE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "task_specific_params",
    "quantization_config", "activation_function", "attn_pdrop", "embd_pdrop", "resid_pdrop",
}  # fmt: skip
_NO_FUNCTION = re.compile(
    r"(_token_id|dropout|_pdrop|_drop)$|^(architectures|initializer_range|init_std|tokenizer_class|id2label|label2id|"
    r"problem_type|return_dict|output_attentions|output_hidden_states|chunk_size_feed_forward)$"
)
"""Fields of a parsed configuration that change no logits: dropout is switched off, and ids are the tokenizer's."""


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


def identify(folder: Path, name: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> BaseIdentity:
    """Fingerprint the model in `folder`; reads headers and a few values, never the whole weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = config.get("n_layer", config.get("num_hidden_layers", "?"))
    width = config.get("n_embd", config.get("hidden_size", "?"))
    weights, forward = weights_fingerprints(folder)
    named = config.get("architectures") if isinstance(config.get("architectures"), list) else []
    return BaseIdentity(
        name=name,
        revision=revision,
        architecture=str(next(iter(named), None) or config.get("model_type", "unknown")),
        shape=f"{layers} layers x {width}, vocabulary {config.get('vocab_size', '?')}",
        config=digest_of({k: v for k, v in config.items() if k not in _VOLATILE}),
        weights=weights,
        tokenizer=digest_of(sorted(tokenizer.get_vocab().items())),
        parsed=digest_of(_parsed(folder)),
        forward=forward,
    )


def sketch_of(exact: bytes, values: torch.Tensor) -> str:
    """A digest of the vectors, which no quantisation touches, and sampled `values` (n, m) of n matrices, as float16."""
    codes = base64.b64encode(values.half().numpy().tobytes()).decode()
    return f"{hashlib.sha256(exact).hexdigest()}:{values.shape[1]}:{codes}"


def alike(one: str, other: str) -> bool:
    """Whether two sketches are of the same weights: vectors are equal, and every matrix's values have a cosine of
    `QUANTISED_COSINE`. Another model's are near 0; a fine-tune's vectors are others, unless only LoRA was merged."""
    try:
        digests, sizes, codes = zip(*(sketch.split(":") for sketch in (one, other)), strict=True)
        first, second = (
            torch.frombuffer(bytearray(base64.b64decode(code)), dtype=torch.float16).float().view(-1, int(sizes[0]))
            for code in codes
        )
    except (ValueError, RuntimeError):
        return False
    if digests[0] != digests[1] or sizes[0] != sizes[1] or first.shape != second.shape:
        return False
    return bool((torch.cosine_similarity(first, second) > QUANTISED_COSINE).all())


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _parsed(folder: Path) -> dict[str, Any]:
    """The configuration as transformers reads it, without what is the default and what changes no logits."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        default = type(config)().to_dict()
    except Exception:  # whatever a configuration without defaults trips over
        default = {}
    return _function({key: value for key, value in config.to_dict().items() if default.get(key, ...) != value}) | {
        "model_type": config.model_type
    }


def _function(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    kept = ((key, value) for key, value in values.items() if not _NO_FUNCTION.search(str(key)))
    return {str(key): _function(value) for key, value in kept if key not in _VOLATILE and value is not None}


def weight_files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """The files of weights and the configuration: path, size, time of change in ns."""
    files = {tensor.file.resolve() for tensor in stored_tensors(folder).values()} | {(folder / "config.json").resolve()}
    return tuple((str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in sorted(files))


def weights_fingerprints(folder: Path) -> tuple[str, str]:
    """(without any output embedding, as it always was; of what the forward pass uses)."""
    return _fingerprints(folder, weight_files(folder))


@lru_cache(maxsize=1)  # a start with mapped weights asks twice
def _fingerprints(folder: Path, _: tuple[tuple[str, int, int], ...]) -> tuple[str, str]:
    stored = stored_tensors(folder)
    tied = AutoConfig.from_pretrained(folder, trust_remote_code=False).tie_word_embeddings
    digest, forward = hashlib.sha256(), hashlib.sha256()
    with ExitStack() as stack:
        files = {file: stack.enter_context(safe_open(file, "pt")) for file in {one.file for one in stored.values()}}
        for name, key in sorted((_plain_name(key), key) for key in stored):
            head = name.startswith("lm_head.")
            mask = name.endswith((".attn.bias", ".attn.masked_bias"))  # of old checkpoints
            line = json.dumps([name, *_sample(files[stored[key].file], stored[key].name)]).encode()
            if not (mask or head):
                digest.update(line)
            if not (follows_from_config(key, stored[key]) or (head and tied and _is_copy(key, stored))):
                forward.update(line)
    return digest.hexdigest(), forward.hexdigest()


def _sample(file: Any, name: str) -> tuple[list[int], list[float]]:
    """Shape and leading values of a tensor in an open file."""
    part = file.get_slice(name)
    shape = part.get_shape()
    rows = part[: max(1, SAMPLED_VALUES // max(1, shape[-1]))] if shape else file.get_tensor(name)
    return shape, rows.flatten()[:SAMPLED_VALUES].float().tolist()


def _is_copy(key: str, stored: dict[str, StoredTensor]) -> bool:
    """Whether a stored tensor is one of the others again, so that nothing is lost with it."""
    alike = (other for name, other in stored.items() if name != key and other.shape == stored[key].shape)
    return any(same_values(stored[key], other, torch.float32) for other in alike if len(other.shape) > 1)


def _plain_name(key: str) -> str:
    """The key without the base-model prefix, so that both layouts of GPT-2's files agree."""
    for prefix in ("transformer.", "model.", "gpt_neox."):
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key
