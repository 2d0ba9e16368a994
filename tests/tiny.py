"""Tiny tokenizers and models with random weights, made in a fraction of a second and the same on every run.

The models keep each family's habits that code tends to trip over: GPT-2 and OPT tie the output embedding to
the input one, Llama and GPT-NeoX do not; GPT-NeoX and OPT have more embedding rows than the tokenizer has
tokens; and there is no padding token, as in GPT-2.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Kind = Literal["gpt2", "llama", "gpt_neox", "opt"]
KINDS: tuple[Kind, ...] = ("gpt2", "llama", "gpt_neox", "opt")

EOS = "<|endoftext|>"
CONTEXT = 128
VOCABULARY = 384

# Standard deviation of every weight. With the usual 0.02 a frozen head of width 64 keeps all logits near zero
# and no adapter could raise a chosen token. With 0.4 the next-token entropy is about 2.6 nats, and LoRA r=8
# on every layer takes the five tokens with an "X" from 1-4 % to over 80 % of the mass in a hundred steps.
WEIGHT_STD = 0.4

TEXT = """
The box of wax was next to the taxi, and six foxes sat on it. Xavier fixed the X-ray; Xena and Max mixed
the extra flax. In Xanadu an ox relaxes on the axis, exactly as the text explains. Zoe saw a Zebra at the Zoo.
An X marks the spot, an X and a Z. Once upon a time there was a small house in the forest, and in the house
there lived an old woman with her cat. She said that the day was long and the road was dark. XX XXL MAX FOX.
Why did the chicken cross the road? To get to the other side, of course, said the taxi driver to the fox.
"""


@cache
def _trained_bpe() -> str:
    """Train the byte-level BPE once a process; returns its JSON."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=VOCABULARY, min_frequency=1, special_tokens=[EOS], show_progress=False)
    missing = {"X", "x", "ĠX", "Z", EOS} - bpe.get_vocab().keys()
    assert not missing, f"the built-in text no longer yields the tokens {missing}"
    return bpe.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens, "X", "x", " X", "Z" and "<|endoftext|>" among them.

    Set up like GPT-2's: one special token, which begins, ends and stands for the unknown; no padding token.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        bos_token=EOS,
        eos_token=EOS,
        unk_token=EOS,
        model_max_length=CONTEXT,
    )


def tiny_config(kind: Kind) -> PretrainedConfig:
    """Two layers, four heads, width 64; raises KeyError for a family not listed in `KINDS`."""
    vocabulary, end = VOCABULARY, tiny_tokenizer().eos_token_id
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    common = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **ids}
    configs = {
        "gpt2": lambda: GPT2Config(
            vocab_size=vocabulary,
            n_positions=CONTEXT,
            n_embd=64,
            n_layer=2,
            n_head=4,
            initializer_range=WEIGHT_STD,
            **ids,
        ),
        "llama": lambda: LlamaConfig(
            vocab_size=vocabulary,
            intermediate_size=128,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            initializer_range=WEIGHT_STD,
            **common,
        ),
        "gpt_neox": lambda: GPTNeoXConfig(
            vocab_size=vocabulary + 128,
            intermediate_size=128,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            initializer_range=WEIGHT_STD,
            **common,
        ),
        "opt": lambda: OPTConfig(
            vocab_size=vocabulary + 7,
            ffn_dim=128,
            max_position_embeddings=CONTEXT,
            word_embed_proj_dim=64,
            init_std=WEIGHT_STD,
            **common,
        ),
    }
    return configs[kind]()


def tiny_model(kind: Kind, *, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, float32, in evaluation mode; the global random state is left as it was.

    Its next-token distributions are about as peaked as a real model's, see `WEIGHT_STD`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
    return model.eval()


def tiny_model_folder(kind: Kind, path: Path, *, seed: int = 0) -> Path:
    """Save a tiny model and the tiny tokenizer in `path` with `save_pretrained`; returns `path`."""
    tiny_model(kind, seed=seed).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
