"""A base's tokenizer and the size of its vocabulary, read without its weights, and without the libraries for those."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..errors import XFactorError
from .claims import check_architecture, check_claims
from .resolve import ModelChoice


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
    check_claims(choice.folder, choice.name)
    try:
        config = AutoConfig.from_pretrained(choice.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise XFactorError(f"{choice.name} cannot be loaded as a causal language model: {reason}") from error
    check_architecture(config, choice.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(choice.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise XFactorError(f"{choice.name}: no usable tokenizer in {choice.folder}: {error}") from error
    return Vocabulary(tokenizer, config.get_text_config().vocab_size)
