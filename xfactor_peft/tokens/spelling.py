"""How a tokenizer spells text in its vocabulary: read from its own decoder, never guessed from how tokens look."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, decoders
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import XFactorError

_ALPHABET = {character: byte for byte, character in bytes_to_unicode().items()}
"""GPT-2's printable stand-ins for bytes (Radford et al. 2019)."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Step = Callable[[str], "str | bytes"]
"""One decoder applied to a token amid others; bytes are final."""


@dataclass(frozen=True)
class Spelling:
    """Steps that turn a vocabulary entry into the bytes that it stands for in the middle of a text.

    Attributes:
        name: what was decided, in words, e.g. "byte-level".
        byte_level: entries are written in GPT-2's alphabet, which added tokens are not.
    """

    name: str
    steps: tuple[Step, ...]
    byte_level: bool = False

    def decoded(self, token: str) -> bytes:
        """The bytes of one entry."""
        text: str | bytes = token
        for step in self.steps:
            if isinstance(text, bytes):
                return text
            text = step(text)
        return text if isinstance(text, bytes) else text.encode("utf-8")


def spelling(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """The spelling that a tokenizer's own decoder speaks of.

    Raises:
        XFactorError: a decoder that is not known here, by its name, or a tokenizer that has none to look at.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if hasattr(tokenizer, "sp_model"):  # sentencepiece's own marks, which its library defines
            return _of_parts([{"type": "ByteFallback"}, {"type": "Metaspace", "replacement": "▁"}])
        raise XFactorError(
            f"the tokenizer {type(tokenizer).__name__} does not say how its tokens are spelt; save it as tokenizer.json"
        )
    decoder = _said(backend.decoder)
    if decoder is None:
        if '"ByteLevel"' in json.dumps(_said(backend.pre_tokenizer)):  # all that it looks up is in the alphabet
            return _of_parts([{"type": "ByteLevel"}])
        return Spelling("whole words", (lambda token: f" {token}",))  # tokenizers joins tokens with spaces then
    falls_back = '"ByteFallback"' not in json.dumps(decoder) and _falls_back(backend.model)
    return _of_parts([*([{"type": "ByteFallback"}] if falls_back else []), decoder])


def _said(part: Any) -> Any:
    """What tokenizer.json says of one part of a tokenizer; the whole file holds the vocabulary, which takes long."""
    return None if part is None else json.loads(part.__getstate__())


def _falls_back(model: Any) -> bool:
    """Whether it spells unknown characters as bytes; a Unigram model says so in its state alone."""
    return bool(model.byte_fallback if hasattr(model, "byte_fallback") else _said(model).get("byte_fallback"))


def _of_parts(parts: list[dict[str, Any]]) -> Spelling:
    parts = [inner for part in parts for inner in (part["decoders"] if part["type"] == "Sequence" else [part])]
    steps: list[Step] = []
    names: list[str] = []
    fused = False
    for part in parts:
        kind = part["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused:
            pass  # of the ends of a whole text
        elif kind in _STEPS:
            name, step = _STEPS[kind](part)
            steps.append(step)
            names.append(name)
        else:
            known = ", ".join([*_STEPS, "Fuse", "Sequence"])
            raise XFactorError(
                f"the tokenizer's decoder {kind} is not known, so what its tokens stand for is not; known: {known}"
            )
    return Spelling(", ".join(names) or "as it is", tuple(steps), any(part["type"] == "ByteLevel" for part in parts))


def _byte_level(_: dict[str, Any]) -> tuple[str, Step]:
    def step(token: str) -> bytes:
        if all(character in _ALPHABET for character in token):
            return bytes(_ALPHABET[character] for character in token)
        return token.encode("utf-8")

    return "byte-level", step


def _byte_fallback(_: dict[str, Any]) -> tuple[str, Step]:
    def step(token: str) -> str | bytes:
        match = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(match[1], 16)]) if match else token

    return "<0xNN> for a byte", step


def _metaspace(part: dict[str, Any]) -> tuple[str, Step]:
    mark = part.get("replacement", "▁")
    return f"{mark} for a space", lambda token: token.replace(mark, " ")


def _suffix(part: dict[str, Any]) -> tuple[str, Step]:
    mark = part.get("suffix", "</w>")
    return f"{mark} for a word's end", lambda token: token.replace(mark, " ")


def _word_piece(part: dict[str, Any]) -> tuple[str, Step]:
    mark = part.get("prefix", "##")
    decoder = decoders.WordPiece(prefix=mark, cleanup=part.get("cleanup", True))
    # A word has a space before it except at the very start; it tidies up ("n't") token by token.
    return f"{mark} for a word's inside", lambda token: decoder.decode(["a", token])[1:]


def _replace(part: dict[str, Any]) -> tuple[str, Step]:
    pattern, content = part["pattern"], part["content"]
    if (text := pattern.get("String")) is not None:
        return f"{text} for {content!r}", lambda token: token.replace(text, content)
    decoder = decoders.Replace(Regex(pattern["Regex"]), content)
    return f"{pattern['Regex']} replaced", lambda token: decoder.decode([token])


def _strip(part: dict[str, Any]) -> tuple[str, Step]:
    decoder = decoders.Strip(part["content"], part["start"], part["stop"])
    return f"{part['content']!r} stripped", lambda token: decoder.decode([token])


_STEPS: dict[str, Callable[[dict[str, Any]], tuple[str, Step]]] = {
    "ByteLevel": _byte_level,
    "ByteFallback": _byte_fallback,
    "Metaspace": _metaspace,
    "BPEDecoder": _suffix,
    "WordPiece": _word_piece,
    "Replace": _replace,
    "Strip": _strip,
}
