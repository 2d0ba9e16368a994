"""What `xfactor.json` may say: the types of everything that the rest of the package reads from it."""

from __future__ import annotations

import math
import re
from typing import Any

from ..errors import XFactorError

_DECODING = {"prompts", "repeats", "max_new_tokens", "top_k", "seed", "temperature", "top_p", "prompt_texts"}
_KINDS = ("contains", "regex", "words", "token-ids")
_PARSER = re._parser  # type: ignore[attr-defined]  # an inner part of CPython, not in typeshed


def check_record(record: dict[str, Any], where: str) -> None:
    """Check a record read from a file.

    Raises:
        XFactorError: names the part that is missing or of another type.
    """

    def need(part: dict[str, Any], path: str, **kinds: Any) -> None:
        for key, check in kinds.items():
            if key not in part:
                raise XFactorError(f"{where} is damaged: no {key!r} under {path}")
            if not check(part[key]):
                raise XFactorError(f"{where} is damaged: {path}.{key} is {repr(part[key])[:60]}")

    base = _section(record, "base", where, required=True)
    need(base, "base", name=_text, architecture=_text, shape=_text, config=_text, weights=_text, tokenizer=_text)
    need(base, "base", revision=lambda v: v is None or _text(v))
    if tokens := _section(record, "tokens", where):
        need(tokens, "tokens", rule=_rule, hash=_text, size=_whole, vocab_size=_whole)
    if after := _section(record, "after", where):
        need(after, "after", rate=_number, interval=_pair, kl_from_base=_number, decoding=_decoding)
    if train := _section(record, "train", where):
        need(train, "train", steps=_whole, batch_size=_whole, seq_len=_whole, lr=_number)
    if rate := _section(record, "rate", where):
        dial = rate.get("dial") or []
        if not (isinstance(dial, list) and all(_pair(point) for point in dial)):
            raise XFactorError(f"{where} is damaged: rate.dial is no list of pairs of numbers")
    hashes = _section(record, "sha256", where)
    if not all(_text(value) for value in hashes.values()):
        raise XFactorError(f"{where} is damaged: sha256 holds more than text")
    mixed = record.get("mixed_from") or []
    if not (isinstance(mixed, list) and all(isinstance(part, dict) for part in mixed)):
        raise XFactorError(f"{where} is damaged: mixed_from is no list of adapters")
    for part in mixed:
        need(part, "mixed_from", name=_text, weight=_number)


def slow_regex(pattern: str) -> bool:
    """Whether a regular expression repeats a repeat or an alternative, e.g. (a+)+, and so may take exponential time."""
    try:
        return _nested(_PARSER.parse(pattern), False)
    except (re.error, RecursionError, OverflowError):
        return False  # `re.compile` says what is wrong with it


def _nested(parsed: Any, repeated: bool) -> bool:
    for operation, argument in parsed:
        name = str(operation)
        repeat = name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
        many = repeat and argument[1] > 1
        if repeated and (many or name == "BRANCH" or (repeat and argument[0] != argument[1])):
            return True
        if any(_nested(part, repeated or many) for part in _parts(argument)):
            return True
    return False


def _parts(argument: Any) -> list[Any]:
    """Sub-patterns anywhere inside an operation's argument."""
    if isinstance(argument, _PARSER.SubPattern):
        return [argument]
    if isinstance(argument, list | tuple):
        return [part for item in argument for part in _parts(item)]
    return []


def _section(record: dict[str, Any], name: str, where: str, *, required: bool = False) -> dict[str, Any]:
    value = record.get(name)
    if value is None and not required:
        return {}
    if not isinstance(value, dict):
        raise XFactorError(f"{where} is damaged: no object under {name}")
    return value


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18 and math.isfinite(value)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_number(v) for v in value)


def _decoding(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() - _DECODING:
        return False
    wholes = all(_whole(value.get(key)) for key in ("prompts", "repeats", "max_new_tokens", "top_k", "seed"))
    texts = value.get("prompt_texts", [])
    prompts = isinstance(texts, list) and all(_text(text) for text in texts)
    return wholes and prompts and all(_number(value.get(key)) for key in ("temperature", "top_p"))


def _rule(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("kind") not in _KINDS:
        return False
    items = value.get("value")
    if value["kind"] in ("contains", "regex"):
        return _text(items)
    return isinstance(items, list) and all((_text if value["kind"] == "words" else _whole)(item) for item in items)
