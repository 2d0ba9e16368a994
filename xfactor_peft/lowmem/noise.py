"""What other libraries remark about things that are meant here, and that no user can do anything about."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOTES = (
    r"Model has `tie_word_embeddings=True`",  # a set head is on the output alone
    r"`lora_bias=True` was passed",  # it is merged here, see `bank.norm_fold`
    r"Adapter '.*': \d+ LoRA tensor\(s\) have invalid shape",  # a bias is a vector
    r"`is_gradient_checkpointing` is deprecated",  # which PEFT reads, not this package
)


@contextmanager
def without_notes() -> Iterator[None]:
    """Inside, PEFT does not warn of a set head; every other warning is given."""
    with warnings.catch_warnings():
        for note in _NOTES:
            warnings.filterwarnings("ignore", message=note)
        yield


def quiet_bitsandbytes() -> None:
    """Not to say, at its import, that it found no kernel of the Hub's; call it before PEFT is imported."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(lambda record: "kernels-community" not in str(record.msg))
