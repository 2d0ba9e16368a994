"""What is bundled: words and phrases that language models overuse, and prompts for writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import XFactorError
from ..tokens.patterns import Pattern, phrases, read_phrases

DATA = Path(__file__).parent / "data"


def overused(add: Sequence[str] = (), keep: Sequence[str] = ()) -> tuple[Pattern, ...]:
    """The bundled list, with `add` and without `keep`.

    Raises:
        XFactorError: something to keep is not in the list, or nothing is left.
    """
    listed = {pattern.text.lower(): pattern for pattern in read_phrases(DATA / "overused.txt")}
    for text in keep:
        if text.lower() not in listed:
            raise XFactorError(f"`keep` {text!r} is not in the list; see it with `list=True`")
        del listed[text.lower()]
    extra = phrases(add) if add else ()
    patterns = tuple({pattern: None for pattern in (*listed.values(), *extra)})
    if not patterns:
        raise XFactorError("nothing is left of the list; keep fewer words")
    return patterns


def writing_prompts() -> tuple[list[str], list[str]]:
    """(those to learn from, those held out), of stories and of other prose alike."""
    return split_prompts((DATA / "writing_prompts.txt").read_text(encoding="utf-8").splitlines())


def split_prompts(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every second one is held out; of a single prompt, none.

    Raises:
        XFactorError: there is no prompt.
    """
    kept = [prompt for prompt in prompts if prompt.strip()]
    if not kept:
        raise XFactorError("`prompts` holds no prompt (one a line is expected)")
    return kept[0::2], kept[1::2]
