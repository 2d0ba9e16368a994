"""What a model and its tokenizer say of themselves against what a GGUF file can say.

Every field is known and written, or known and without effect on text, or refused by name. llama.cpp has the families'
arithmetic in its code and takes sizes, the norm's epsilon and rotary parameters from the file; of a tokenizer it takes
the vocabulary, the merges, the types of tokens and the name of a way to split text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..base.gguf_tokenizer import splitting_of
from ..errors import XFactorError
from ..tokens.ends import end_ids

WAY_ROUND = "export as merged and use llama.cpp's convert_hf_to_gguf.py"
_WITHOUT_EFFECT = {
    "transformers_version", "architectures", "model_type", "dtype", "use_cache", "initializer_range", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder", "id2label",
    "label2id", "problem_type", "task_specific_params", "pretraining_tp", "_name_or_path", "_model_name_or_path",
    "unk_token_id", "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "predict_special_tokens",
    "n_special", "n_ctx", "reorder_and_upcast_attn", "gradient_checkpointing", "torch_dtype",
    "_attn_implementation",
}  # fmt: skip
_WRITTEN = {
    "gpt2": {
        "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon",
    },
    "llama": {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "head_dim", "attention_bias", "mlp_bias",
        "rope_theta",
    },
}  # fmt: skip
_OF_ALL = {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}


def _plain_rope(value: Any) -> bool:
    """Rotary positions that the file's one base says completely."""
    rope = dict(value or {})
    return (
        rope.pop("rope_theta", None) is not None
        and rope.pop("rope_type", "default") == "default"
        and rope.pop("partial_rotary_factor", 1.0) == 1.0
        and not rope
    )


_MUST: dict[str, dict[str, Callable[[Any], bool]]] = {
    "gpt2": {
        "activation_function": lambda v: v in ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": lambda v: v is True,
        "scale_attn_by_inverse_layer_idx": lambda v: v is False,
        "add_cross_attention": lambda v: v is False,
    },
    "llama": {"hidden_act": lambda v: v in ("silu", "swish"), "rope_parameters": _plain_rope},
}
"""The one arithmetic that llama.cpp has for the family."""


def check_config(config: PretrainedConfig) -> None:
    """Raises XFactorError for a field, or a value of it, that llama.cpp's arithmetic of the family does not know."""
    family = config.model_type
    if family not in _MUST:
        raise XFactorError(f"whole GGUF models are written for {' and '.join(_MUST)}, not {family}; {WAY_ROUND}")
    must, known = _MUST[family], _WITHOUT_EFFECT | _OF_ALL | _WRITTEN[family]
    for name, value in config.to_dict().items():
        if name in known:
            continue
        if name not in must or not must[name](value):
            raise XFactorError(
                f"a GGUF file of a {family} model cannot say `{name}={json.dumps(value, default=str)}`; {WAY_ROUND}"
            )


_SPLITTING = {name: json.loads(splitting_of(name).__getstate__()) for name in ("gpt-2", "smollm")}
"""Ways to split text before merges apply that are written, by llama.cpp's names."""
_MODEL = {
    "type": ("BPE",), "dropout": (None,), "continuing_subword_prefix": ("", None), "end_of_word_suffix": ("", None),
    "byte_fallback": (False,), "ignore_merges": (False,),
}  # fmt: skip


def splitting(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how this tokenizer splits text.

    Raises:
        XFactorError: it is not byte-level BPE of a kind in `_SPLITTING`, or does more than that (a normaliser, tokens
            that take the spaces beside them, and the like).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise XFactorError(f"GGUF export needs the tokenizer's tokenizer.json; {WAY_ROUND}")
    spec = json.loads(backend.to_str())
    splits = _without_offsets(spec["pre_tokenizer"])
    name = next((name for name, known in _SPLITTING.items() if _without_offsets(known) == splits), None)
    found = {
        "model": spec["model"].get("type") == "BPE" or spec["model"].get("type"),
        "normalizer": spec["normalizer"] is None or spec["normalizer"],
        "pre_tokenizer": name is not None or spec["pre_tokenizer"],
        "decoder": (spec["decoder"] or {}).get("type") == "ByteLevel" or spec["decoder"],
    }
    if found["model"] is True:
        found |= {key: spec["model"].get(key) in ok or spec["model"].get(key) for key, ok in _MODEL.items()}
        for token in spec["added_tokens"]:
            marks = [key for key in ("single_word", "lstrip", "rstrip") if token[key]]
            found[f"added token {token['content']!r}"] = not marks or f"{' and '.join(marks)} set"
    for key, value in found.items():
        if value is not True:
            raise XFactorError(
                f"GGUF export knows byte-level BPE tokenizers of the kinds {', '.join(_SPLITTING)}; this one has "
                f"{key}: {json.dumps(value)[:120]}; {WAY_ROUND}"
            )
    assert name is not None
    return name


def _without_offsets(value: Any) -> Any:
    """A part of a tokenizer without what concerns offsets into the text alone."""
    if isinstance(value, dict):
        return {key: _without_offsets(item) for key, item in value.items() if key != "trim_offsets"}
    return [_without_offsets(item) for item in value] if isinstance(value, list) else value


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS behind every text; raises XFactorError for anything else."""
    whole, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    before, behind = tokenizer.bos_token_id, tokenizer.eos_token_id
    for bos in (False, True):
        for eos in (False, True):
            if whole == [before] * bos + plain + [behind] * eos:
                return bos, eos
    raise XFactorError(f"a GGUF file cannot say that the tokenizer makes {whole} of 'a'; {WAY_ROUND}")


def ends(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """The tokens that end a text, EOS first, and perhaps one more; raises XFactorError for more than that."""
    first = tokenizer.eos_token_id
    found = [first] * (first is not None) + [i for i in end_ids(tokenizer, model) if i != first]
    if len(found) > 2:
        raise XFactorError(f"a GGUF file names at most two end tokens, the model has {found}; {WAY_ROUND}")
    return found
