"""Generated text in parts, those made of set tokens marked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from transformers import PreTrainedTokenizerBase

from .printable import printable
from .token_set import TokenSet


def marked_parts(
    tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], sets: Iterable[TokenSet]
) -> list[tuple[str, bool]]:
    """(text, whether its tokens are members of any of the sets), in order.

    Runs of members and of others are decoded together, so that characters made of several tokens stay whole.
    """
    members = {i for tokens in sets for i in tokens.ids}
    parts: list[tuple[str, bool]] = []
    run: list[int] = []
    inside = False
    for i in [*ids, None]:
        if run and (i is None or (i in members) != inside):
            parts.append((printable(cast(str, tokenizer.decode(run))), inside))
            run = []
        if i is not None:
            inside = i in members
            run.append(i)
    return parts
