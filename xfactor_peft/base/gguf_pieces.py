"""SentencePiece vocabularies of GGUF files as byte-pair merges that make llama.cpp's tokens.

llama.cpp merges, as long as there is one, the pair of neighbours whose text is the token of the highest score, the
leftmost of several; a character without a token becomes its bytes. So every way to cut a token into two tokens is a
merge, and the scores are their order. Where runs of a character (spaces) share a score, the leftmost grows as
long as it can; so it does where longer ones come first.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

SPACE = "\u2581"
_BYTES = {f"<0x{value:02X}>" for value in range(256)}


def pieces(fields: dict[str, Any], whole: set[str]) -> Tokenizer:
    """The tokenizer without its added tokens, from the fields `tokens`, `scores` and `add_space_prefix`.

    `whole` are the tokens that are found in a text before anything is merged.

    Raises:
        ValueError: two merged tokens that are no runs of a character have one score, which leaves their order to
            their places in the text, a byte has no token, or the scores are not numbers, one a token.
    """
    tokens, scores = fields["tokens"], fields["scores"]
    if len(scores) != len(tokens) or not all(isinstance(s, float) and s == s for s in scores):
        raise ValueError("tokens and their scores do not fit together")
    if missing := sorted(_BYTES - set(tokens)):
        raise ValueError(f"the byte token {missing[0]} is missing, so that not every text has tokens")
    backend = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, _merges(tokens, scores, whole), byte_fallback=True))
    # Normalisers see the text between added tokens piece by piece, and llama.cpp puts a space before each.
    prefix = fields.get("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE)] * bool(prefix) + [normalizers.Replace(" ", SPACE)]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * bool(prefix))
    return backend


def _merges(tokens: list[str], scores: list[float], whole: set[str]) -> list[tuple[str, str]]:
    parts, found, made = set(tokens) - _BYTES - whole, [], defaultdict[float, list[str]](list)
    for token, score in zip(tokens, scores, strict=True):
        cuts = [cut for cut in range(1, len(token)) if token[:cut] in parts and token[cut:] in parts]
        if cuts and token not in whole:
            made[score].append(token)
            found += [(-score, -len(token), -cut, token) for cut in cuts]
    for score, tied in made.items():
        if len(tied) > 1 and len(set().union(*tied)) > 1:
            raise ValueError(f"the tokens {tied[0]!r} and {tied[1]!r} have one score, {score:g}")
    return [(token[:-less], token[-less:]) for _, _, less, token in sorted(found)]
