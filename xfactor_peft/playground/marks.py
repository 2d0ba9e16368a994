"""Marks: what a person says of words in a model's texts, as lines that can be typed as well, and the rules they make.

tapestry = 0            never
a testament to = x0.3   a factor of the base's own rate
delv* = 0.5/1000w       in 1,000 words
chars:— = x0.5          of characters; script:Han = 0 of scripts
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..adapters.adapter import AdapterInfo
from ..errors import XFactorError
from ..options import PhraseOptions
from ..phrases.goals import PhraseGoal, PhraseTarget, Wanted, goals_from, phrase_goal
from ..phrases.lists import split_prompts, writing_prompts
from ..phrases.reference import measure
from ..phrases.rules import Rules
from ..phrases.scores import risen
from ..tokens.patterns import Pattern, found, phrases

LESS, MORE, NEVER = "x0.3", "x2", "0"
ROUND = PhraseOptions(texts=64, length=64, eval_texts=32, trunk_epochs=2, cache=512)
"""A round that a person waits for: fewer and shorter texts than a run of `xfactor unslop`."""
ENOUGH = 4
"""Prompts of which every second is held out; of fewer all are, and the bundled ones are learnt from."""
MOST_WORDS = 12
"""Words that a text to be like gives where nothing is marked."""
_KINDS = ("chars", "script")


def goals_of(marks: str) -> tuple[PhraseGoal, ...]:
    """What the marks ask for: phrases that are to come never together, every other line by itself.

    Raises:
        XFactorError: no mark, or a line that is none.
    """
    never: dict[Pattern, None] = {}
    goals: list[PhraseGoal] = []
    for line in filter(str.strip, marks.splitlines()):
        what, equals, rate = (part.strip() for part in line.rpartition("="))
        if not (equals and what):
            raise XFactorError(
                f"{line.strip()!r} is no mark; write PHRASE = RATE, e.g. tapestry = 0, a sense of = x0.3"
            )
        kind, colon, value = what.partition(":")
        known = kind in _KINDS and colon
        goal = phrase_goal(kind if known else "phrase", value if known else what, Wanted.parse(rate))
        if goal.wanted.value or known:
            goals.append(goal)
        else:
            never |= dict.fromkeys(goal.patterns)
    if never:
        goals.insert(0, PhraseGoal("never", tuple(never), Wanted(0.0)))
    if not goals:
        raise XFactorError("nothing is marked yet; select words in the texts, or type them")
    return tuple(goals)


def marked_with(marks: str, phrase: str, rate: str, texts: Sequence[str] = ()) -> str:
    """The marks with one more, which stands for whole words of the texts; a rate that it has already is multiplied.

    Raises:
        XFactorError: there is no phrase, or a line of the marks is none.
    """
    what, wanted, lines = _whole(phrase, texts), Wanted.parse(rate), []
    for goal in goals_of(marks) if marks.strip() else ():
        for pattern in goal.patterns:
            if _shown(pattern).lower() != what.lower():
                lines.append(_line(_shown(pattern), goal.wanted))
            elif wanted.unit == "x" and wanted.value and goal.wanted.value:
                wanted = replace(goal.wanted, value=goal.wanted.value * wanted.value)
    return "\n".join([*lines, _line(what, wanted)])


def _whole(phrase: str, texts: Sequence[str]) -> str:
    """What was selected or typed as whole words, without signs at its ends; signs alone are characters."""
    phrase = " ".join(phrase.split())
    if not phrase:
        raise XFactorError("select a word or a phrase in the texts, or type one")
    core = re.sub(r"^[^\w*]+|[^\w*]+$", "", phrase)
    if not core.strip("* "):
        return "chars:" + "".join(dict.fromkeys(phrase.replace(" ", "")))
    if "*" in core or any(found(Pattern(core), text) for text in texts):
        return core
    words = r"\s+".join(map(re.escape, core.split()))
    around = re.compile(rf"\b\w{{0,2}}{words}\w{{0,2}}\b", re.IGNORECASE)  # two letters missed, not "sea" in "research"
    part = next((match for text in texts if (match := around.search(text))), None)
    return " ".join(part[0].split()) if part else core


def _shown(pattern: Pattern) -> str:
    kind = {"char": "chars:", "script": "script:"}.get(pattern.kind, "")
    return kind + pattern.text


def _line(what: str, wanted: Wanted) -> str:
    value = max(1e-4, round(wanted.value, 4)) if wanted.value else 0.0
    short = replace(wanted, value=int(value) if value == int(value) else value)
    return f"{what} = {short.text()}"


def marks_of(info: AdapterInfo) -> str:
    """The marks that an adapter for phrases was made by, so that a round may start from it; "" for others."""
    goals = goals_from([info])
    return "\n".join(_line(_shown(pattern), goal.wanted) for goal in goals for pattern in goal.patterns)


def like_text(marks: str, path: Path, texts: Sequence[str]) -> str:
    """The marks at their rates in a text of people's; where there are none, words that the model's texts overuse.

    Raises:
        XFactorError: nothing to mark, or a text that no rate can be measured in.
    """
    if marks.strip():
        patterns: Sequence[Pattern] = [pattern for goal in goals_of(marks) for pattern in goal.patterns]
    elif texts:
        patterns = phrases(word for word, *_ in risen([path.read_text("utf-8-sig", "replace")], texts, MOST_WORDS))
    else:
        raise XFactorError("mark words, or look at samples first: which words are to be as in the text?")
    measured = measure(path, patterns)
    return "\n".join(_line(_shown(m.pattern), Wanted(m.rate, "w")) for m in measured)


def prompts_of(text: str) -> list[str]:
    """The prompts of a text with one a line, each once.

    Raises:
        XFactorError: there is none.
    """
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not lines:
        raise XFactorError("there is no prompt; write one a line")
    return lines


def rules_of(marks: str, prompts: list[str], texts: int) -> Rules:
    """The rule file of a round: the marks, the prompts, and how many texts are learnt from.

    Raises:
        XFactorError: as `goals_of`.
    """
    fit, held_out = split_prompts(prompts)
    if len(prompts) < ENOUGH:
        fit, held_out = [prompt for part in writing_prompts() for prompt in part if prompt not in prompts], prompts
    options = replace(ROUND, texts=texts, eval_texts=max(4, texts // 2))
    return Rules(PhraseTarget(goals_of(marks)), tuple(fit), tuple(held_out), options=options)
