"""Fingerprints of a base model that do not depend on how its weights were loaded."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..lowmem.checkpoint_files import StoredTensor, follows_from_config, same_values, stored_tensors
from .identity import BaseIdentity, digest_of

SAMPLED_VALUES = 256
"""Leading values of every tensor that enter the weights' fingerprint."""

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
