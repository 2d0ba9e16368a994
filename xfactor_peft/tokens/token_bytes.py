"""The bytes that a vocabulary entry stands for, whatever the tokenizer's own spelling of them."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from .ends import special_ids
from .printable import counted
from .spelling import spelling

_MARKER = re.compile(r"<.+>|\[.+\]|\{.+\}", re.DOTALL)


def markers(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Added tokens in brackets that are not special: <|fim_suffix|>, <unused0>, <tool_call>.

    They are roles, not text, and in no rule's set; other added tokens (runs of spaces, words) are text.
    """
    how, special = spelling(tokenizer), special_ids(tokenizer)
    return {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if i not in special and _MARKER.fullmatch(token.content)
        and how.decoded(token.content).strip() == token.content.encode("utf-8")  # not a byte, <0x0A>
    }  # fmt: skip


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """id -> the bytes it stands for amid a text, for every token that is neither special nor a marker.

    As the tokenizer's own decoder has it (see `spelling`): byte-level vocabularies (GPT-2, Llama 3, Qwen) are mapped
    back from their printable alphabet; sentencepiece ones (Llama 2, Mistral, Gemma) read "▁" as a space and "<0xNN>" as
    one byte; GPT-1's "the</w>" is "the " and WordPiece's "##ing" is "ing", its "the" " the".

    Raises:
        XFactorError: a decoder that is not known.
    """
    how, left_out = spelling(tokenizer), special_ids(tokenizer) | markers(tokenizer).keys()
    added, result = tokenizer.added_tokens_decoder.keys(), {}
    for token, i in tokenizer.get_vocab().items():
        if i not in left_out:
            raw = how.byte_level and i in added  # looked for in the text as it is
            result[i] = token.encode("utf-8") if raw else how.decoded(token)
    return dict(sorted(result.items()))


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """id -> its bytes as text; bytes that are no UTF-8 on their own become lone surrogates, so nothing is lost."""
    return {i: raw.decode("utf-8", errors="surrogateescape") for i, raw in token_bytes(tokenizer).items()}


def spelling_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """What was decided about the vocabulary, for people."""
    special, roles = special_ids(tokenizer), markers(tokenizer)
    names = f" ({', '.join(list(roles.values())[:3])}{', …' if len(roles) > 3 else ''})" if roles else ""
    left = f"{counted(len(special), 'special token')}, {counted(len(roles), 'marker')}{names}"
    return f"{spelling(tokenizer).name}; in no rule's set: {left}"
