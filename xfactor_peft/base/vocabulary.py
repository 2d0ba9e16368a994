"""A base's tokenizer and the size of its vocabulary, read without its weights, and without the libraries for those."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import XFactorError, first_line
from .claims import check_architecture, check_claims
from .gguf_config import config_of
from .gguf_tokenizer import open_gguf, tokenizer_of
from .resolve import ModelChoice

_PROBE = "a A the 1"
"""Some of it is in every vocabulary, be it one of the letters of proteins."""


@dataclass(frozen=True)
class Vocabulary:
    """What token sets need to know of a base: its tokenizer, and V as the configuration has it."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int


def read_vocabulary(choice: ModelChoice) -> Vocabulary:
    """The vocabulary of a model that was found.

    Raises:
        XFactorError: the files are not of a causal language model with a tokenizer, as far as these show it.
    """
    if choice.gguf is not None:
        file = open_gguf(choice.gguf)
        return Vocabulary(tokenizer_of(file), config_of(file).vocab_size)
    check_claims(choice.folder, choice.name)
    try:
        config = AutoConfig.from_pretrained(choice.folder, trust_remote_code=False)
    except Exception as error:  # whatever a library makes of files that are not ours
        raise XFactorError(f"{choice.name} cannot be loaded as a causal language model: {reason(error)}") from error
    check_architecture(config, choice.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(choice.folder, trust_remote_code=False)
        if set(tokenizer(_PROBE, add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
            raise ValueError("it knows no letter, as some do that are loaded without their files")
        tokenizer.decode(tokenizer.all_special_ids)
    except Exception as error:  # the same
        raise XFactorError(
            f"{choice.name}: no usable tokenizer in {choice.folder} ({reason(error).rstrip(':. ')}); save it there "
            "with tokenizer.save_pretrained"
        ) from error
    return Vocabulary(tokenizer, config.get_text_config().vocab_size)


def reason(error: Exception) -> str:
    """An exception of transformers in one line: what validation found is in its last one."""
    lines = str(error).strip().splitlines()
    validation = type(error).__name__.startswith("StrictDataclass") and len(lines) > 1
    return f"{first_line(error)} {lines[-1].strip()}" if validation else first_line(error)
