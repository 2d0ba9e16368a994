"""The bytes that a vocabulary entry stands for, whatever the tokenizer's own spelling of them."""

from __future__ import annotations

import json
import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}
"""GPT-2's printable stand-ins for bytes (Radford et al. 2019)."""


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    spec = json.loads(backend.to_str())
    return any('"ByteLevel"' in json.dumps(spec.get(part)) for part in ("decoder", "pre_tokenizer"))


def _from_byte_level(token: str) -> bytes:
    if all(character in _ALPHABET for character in token):
        return bytes(_ALPHABET[character] for character in token)
    return token.encode("utf-8")


def _from_sentencepiece(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    if match:
        return bytes([int(match.group(1), 16)])
    return token.replace("▁", " ").encode("utf-8")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that stand for no text: EOS, BOS, padding, chat markers and the like."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """id -> the bytes it stands for, for every token that is not special.

    Byte-level vocabularies (GPT-2, Llama 3, Qwen) are mapped back from their printable alphabet;
    sentencepiece ones (Llama 2, Mistral, Gemma) read "▁" as a space and "<0xNN>" as one byte.
    """
    decode = _from_byte_level if _is_byte_level(tokenizer) else _from_sentencepiece
    special = special_ids(tokenizer)
    added = tokenizer.added_tokens_decoder
    result = {}
    for token, i in tokenizer.get_vocab().items():
        if i not in special:
            result[i] = added[i].content.encode("utf-8") if i in added else decode(token)
    return dict(sorted(result.items()))


def token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """id -> its bytes as text; bytes that are no UTF-8 on their own become lone surrogates, so nothing is lost."""
    return {i: raw.decode("utf-8", errors="surrogateescape") for i, raw in token_bytes(tokenizer).items()}
