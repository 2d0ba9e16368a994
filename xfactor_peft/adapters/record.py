"""What `xfactor.json` may say: the types of everything that the rest of the package reads from it."""

from __future__ import annotations

from typing import Any

from ..errors import XFactorError
from ..tokens.patterns import Pattern
from ..tokens.rule import Rule
from .values import is_number, is_text, is_whole, shown


def check_record(record: dict[str, Any], where: str) -> None:
    """Check a record read from a file. Only `base` must be there; the other sections may be missing or empty.

    Raises:
        XFactorError: names the part that is missing or of another type.
    """
    for section, checks in _SECTIONS.items():
        part = record.get(section)
        if part in (None, {}) and section != "base":
            continue
        if not isinstance(part, dict):
            raise XFactorError(f"{where} is damaged: no object under {section}")
        for key, check in checks.items():
            if not check(part.get(key)):
                raise XFactorError(f"{where} is damaged: {section}.{key} is {shown(part.get(key))}")
    for key, check in _VALUES.items():
        if record.get(key) and not check(record[key]):
            raise XFactorError(f"{where} is damaged: {key} is {shown(record[key])}")


def _is_pair(value: Any) -> bool:
    return _is_list(value, is_number) and len(value) == 2


def _is_list(value: Any, check: Any) -> bool:
    return isinstance(value, list) and all(check(item) for item in value)


def _is_goal(value: Any) -> bool:
    """One of the goals of a wanted rate, with what `catalogue` shows of it."""
    return (
        isinstance(value, dict)
        and all(value.get(key) is None or is_number(value[key]) for key in ("rate", "strength"))
        and isinstance(value.get("tokens"), dict)
        and _is_rule(value["tokens"].get("rule"))
        and all(is_whole(value["tokens"].get(key)) for key in ("size", "vocab_size"))
        and is_text(value["tokens"].get("hash"))
    )


def _is_rule(value: Any) -> bool:
    try:
        return isinstance(value, dict) and bool(Rule.from_record(value))
    except XFactorError:
        return False


def _is_decoding(value: Any) -> bool:
    wholes, numbers = ("prompts", "repeats", "max_new_tokens", "top_k", "seed"), ("temperature", "top_p")
    return (
        isinstance(value, dict)
        and value.keys() <= {*wholes, *numbers, "prompt_texts"}
        and all(is_whole(value.get(key)) for key in wholes)
        and all(is_number(value.get(key)) for key in numbers)
        and _is_list(value.get("prompt_texts", []), is_text)
    )


def _is_phrase_goal(value: Any) -> bool:
    """Patterns and what was wanted of them, with what `card` and `catalogue` show of it."""
    if not isinstance(value, dict) or not _is_list(value.get("patterns"), lambda part: isinstance(part, dict)):
        return False
    try:
        [Pattern.from_record(part) for part in value["patterns"]]
    except XFactorError:
        return False
    return is_text(value.get("name")) and is_number(value.get("rate")) and value.get("unit") in ("x", "w", "t")


def _is_phrase_scores(value: Any) -> bool:
    """None, or what was counted in texts."""
    return value is None or (
        isinstance(value, dict)
        and all(is_number(value.get(key)) for key in ("per_1000_words", "kl", "distinct_2"))
        and _is_pair(value.get("interval"))
        and is_whole(value.get("words"))
    )


def _is_source(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("name")) and is_number(value.get("weight"))


_SECTIONS: dict[str, dict[str, Any]] = {
    "base": {
        **dict.fromkeys(("name", "architecture", "shape", "config", "weights", "tokenizer"), is_text),
        "revision": lambda value: value is None or is_text(value),
    },
    "tokens": {"rule": _is_rule, "hash": is_text, "size": is_whole, "vocab_size": is_whole},
    "after": {"rate": is_number, "interval": _is_pair, "kl_from_base": is_number, "decoding": _is_decoding},
    "train": {**dict.fromkeys(("steps", "batch_size", "seq_len"), is_whole), "lr": is_number},
    "rate": {
        "dial": lambda value: not value or _is_list(value, _is_pair),
        "wanted": lambda value: not value or _is_list(value, is_number),
        "strengths": lambda value: not value or _is_list(value, is_number),
    },
    "phrases": {
        "goals": lambda value: _is_list(value, _is_phrase_goal),
        "tokens": is_whole,
        "before": _is_phrase_scores,
        "after": _is_phrase_scores,
    },
    "target": {"goals": lambda value: not value or _is_list(value, _is_goal)},
}
_VALUES: dict[str, Any] = {
    "sha256": lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
    "mixed_from": lambda value: _is_list(value, _is_source),
    "steps_made": is_whole,
}
