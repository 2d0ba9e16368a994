"""Generated text in parts, those made of set tokens marked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from transformers import PreTrainedTokenizerBase

from .printable import printable
from .token_set import TokenSet

UNFINISHED = "\ufffd"
"""What the bytes of an unfinished character are decoded to."""


def marked_parts(
    tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], sets: Iterable[TokenSet]
) -> list[tuple[str, bool]]:
    """(text, whether its tokens are members of any of the sets), in order; together the text of all the ids.

    A part is what the decoded text grows by, so that no part has spaces of its own and none is lost; a character made
    of several tokens belongs to the part that completes it.
    """
    ids, members = list(ids), {i for tokens in sets for i in tokens.ids}
    parts: list[tuple[str, bool]] = []
    start = done = 0
    while start < len(ids):
        inside, end = ids[start] in members, start + 1
        while end < len(ids) and (ids[end] in members) == inside:
            end += 1
        text = cast(str, tokenizer.decode(ids[:end]))
        stop = len(text) if end == len(ids) else len(text.rstrip(UNFINISHED))
        if stop > done:
            parts.append((printable(text[done:stop]), inside))
            done = stop
        start = end
    return parts
