"""Which base model is this? Fingerprints that do not depend on how the weights were loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

SAMPLED_VALUES = 256
"""Leading values of every tensor that enter the weights' fingerprint."""

# Keys of config.json that change without the function of the model changing.
_VOLATILE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "task_specific_params",
    "quantization_config", "activation_function", "attn_pdrop", "embd_pdrop", "resid_pdrop",
}  # fmt: skip


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
    """

    name: str
    revision: str | None
    architecture: str
    shape: str
    config: str
    weights: str
    tokenizer: str

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: BaseIdentity) -> list[str]:
        """Which of config, weights and tokenizer differ; empty when an adapter fits."""
        return [key for key in ("config", "weights", "tokenizer") if getattr(self, key) != getattr(other, key)]

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture}, {self.shape}, weights {self.weights[:8]})"


def identify(folder: Path, name: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> BaseIdentity:
    """Fingerprint the model in `folder`; reads headers and a few values, never the whole weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = config.get("n_layer", config.get("num_hidden_layers", "?"))
    width = config.get("n_embd", config.get("hidden_size", "?"))
    return BaseIdentity(
        name=name,
        revision=revision,
        architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
        shape=f"{layers} layers x {width}, vocabulary {config.get('vocab_size', '?')}",
        config=_digest({k: v for k, v in config.items() if k not in _VOLATILE}),
        weights=_weights_fingerprint(folder),
        tokenizer=_digest(sorted(tokenizer.get_vocab().items())),
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _weights_fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    entries = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            entries += [(_plain_name(key), path, key) for key in file.keys()]  # noqa: SIM118 (not a dict)
    for name, path, key in sorted(entries):
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name.startswith("lm_head."):
            continue  # causal-mask buffers of old checkpoints, and a head that may be tied
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(key)
            shape = part.get_shape()
            rows = part[: max(1, SAMPLED_VALUES // max(1, shape[-1]))] if shape else file.get_tensor(key)
            values = rows.flatten()[:SAMPLED_VALUES].float().tolist()
        digest.update(json.dumps([name, shape, values]).encode())
    return digest.hexdigest()


def _plain_name(key: str) -> str:
    """The key without the base-model prefix, so that both layouts of GPT-2's files agree."""
    for prefix in ("transformer.", "model.", "gpt_neox."):
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key
