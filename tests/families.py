"""More families of tiny models than `tiny.KINDS`, each with a habit that code could trip over."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
)

from tests.tiny import CONTEXT, VOCABULARY, WEIGHT_STD, tiny_config, tiny_tokenizer

OLD = ("gpt2", "llama", "gpt_neox", "opt")
FAMILIES = (*OLD, "qwen", "mistral", "phi", "gemma", "gpt2-untied", "llama-tied")


def family_config(family: str) -> PretrainedConfig:
    """Two layers of width 64.

    qwen: biases on queries, keys and values. phi: an output embedding with a bias, LayerNorm, parallel blocks. gemma:
    scaled embeddings, tied. gemma2: soft-capped logits. gpt2-untied and llama-tied: the other way round than usual.
    """
    if family in OLD:
        return tiny_config(family)
    end = tiny_tokenizer().eos_token_id
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "initializer_range": WEIGHT_STD, "bos_token_id": end, "eos_token_id": end, "pad_token_id": None,
    }  # fmt: skip
    if family == "gpt2-untied":
        config = tiny_config("gpt2").to_dict() | {"tie_word_embeddings": False}
        return GPT2Config(**config)
    if family == "llama-tied":
        config = tiny_config("llama")
        config.tie_word_embeddings = True
        return config
    return {
        "qwen": lambda: Qwen2Config(**common, tie_word_embeddings=True),
        "mistral": lambda: MistralConfig(**common, sliding_window=None),
        "phi": lambda: PhiConfig(**{**common, "num_key_value_heads": 4}),
        "gemma": lambda: GemmaConfig(**{**common, "initializer_range": 0.1}, head_dim=16),
        "gemma2": lambda: Gemma2Config(**common, head_dim=16, final_logit_softcapping=30.0),
    }[family]()


def family_folder(family: str, path: Path) -> Path:
    """A model with random weights, biases included, and the tiny tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(family), dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
