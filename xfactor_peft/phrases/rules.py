"""A rule file: everything that a run for phrases is made of, in YAML, and in the record of what came of it.

goals:
  - phrases: [tapestry, a testament to, "delv*"]     # or the name of a file, one a line
    rate: 0                                          # or x0.1, 2.0/1000w, 2.0/1000t
  - chars: "—"
    rate: x0.5
  - script: [Han]
    rate: 0
prompts: [Write a story about a fox., Describe a market.]    # or a file; the bundled ones where there are none
held_out: [Write about the sea.]                             # every second prompt where there are none
chat: auto
options: {texts: 256, seed: 0}                               # `PhraseOptions`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import XFactorError, text_of
from ..options import ChatOptions, PhraseOptions
from ..tokens.patterns import phrases, read_phrases
from .goals import KINDS, PhraseGoal, PhraseTarget, Wanted, phrase_goal
from .lists import split_prompts, writing_prompts

KEYS = ("goals", "prompts", "held_out", "chat", "system", "options")


@dataclass(frozen=True)
class Rules:
    """What a run is asked for.

    Attributes:
        prompts, held_out: texts are learnt from after the first, and scored after the others.
    """

    target: PhraseTarget
    prompts: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    chat: ChatOptions = field(default_factory=lambda: ChatOptions("auto"))
    options: PhraseOptions = field(default_factory=PhraseOptions)

    def record(self) -> dict[str, Any]:
        """As a rule file says it, with nothing left in other files."""
        goals = [_goal_record(goal) for goal in self.target.goals]
        system = {"system": self.chat.system} if self.chat.system is not None else {}
        return {
            "goals": goals,
            "prompts": list(self.prompts),
            "held_out": list(self.held_out),
            "chat": self.chat.mode,
            **system,
            "options": asdict(self.options),
        }


def read_rules(path: str | Path) -> Rules:
    """A rule file, or the record of an adapter that was made by one (its `xfactor.json`).

    Raises:
        XFactorError: it cannot be read, or says something that is not known.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if len(text) > 4 * 2**20:
            raise XFactorError(f"`rules` {path} is larger than 4 MiB")
        value = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise XFactorError(f"`rules` {path}: cannot be read as YAML or JSON: {error}") from error
    if isinstance(value, Mapping) and "format" in value:
        value = value.get("rules")
    try:
        return parse_rules(value, path.parent)
    except XFactorError as error:
        raise XFactorError(f"`rules` {path}: {error}") from error


def parse_rules(value: Any, folder: Path = Path()) -> Rules:
    """What a rule file says; the files that it names are beside it, in `folder`."""
    if not isinstance(value, Mapping) or not isinstance(value.get("goals"), list):
        raise XFactorError("expected `goals`, a list of patterns with a rate each")
    _known(value, KEYS, "a rule file")
    goals = tuple(_goal(goal, folder) for goal in value["goals"])
    if value.get("prompts"):
        fit, held_out = split_prompts(_lines(value["prompts"], folder, "prompts"))
    else:
        fit, held_out = writing_prompts()
    if "held_out" in value:
        every = _lines(value["prompts"], folder, "prompts") if value.get("prompts") else [*fit, *held_out]
        held_out = _lines(value["held_out"], folder, "held_out")
        fit = [prompt for prompt in every if prompt.strip() and prompt not in held_out]
    options = value.get("options") or {}
    if not isinstance(options, Mapping):
        raise XFactorError("`options` must be a table of settings")
    _known(options, tuple(f.name for f in fields(PhraseOptions)), "`options`")
    chat = value.get("chat", "auto")
    if isinstance(chat, bool):  # YAML's own reading of on and off
        chat = "on" if chat else "off"
    try:
        made = PhraseOptions(**{name: _number(setting) for name, setting in options.items()})
    except TypeError as error:
        raise XFactorError(f"`options`: {error}") from error
    return Rules(PhraseTarget(goals), tuple(fit), tuple(held_out), ChatOptions(str(chat), value.get("system")), made)


def _known(value: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    if unknown := sorted(str(key) for key in value if key not in keys):
        raise XFactorError(f"{where} knows no {unknown[0]!r}; it knows {', '.join(keys)}")


def _goal(value: Any, folder: Path) -> PhraseGoal:
    kinds = [kind for kind in KINDS if isinstance(value, Mapping) and kind in value]
    if len(kinds) != 1:
        raise XFactorError(f"a goal has exactly one of {', '.join(KINDS)}; got {value!r}")
    _known(value, (*kinds, "rate", "ignore_case", "name"), "a goal")
    if "rate" not in value:
        raise XFactorError(f"the goal {value!r} has no rate")
    kind, what, wanted = kinds[0], value[kinds[0]], Wanted.parse(str(value["rate"]))
    ignore_case = value.get("ignore_case", True)
    if not isinstance(ignore_case, bool):
        raise XFactorError(f"`ignore_case` must be true or false; got {ignore_case!r}")
    if kind == "phrases" and isinstance(what, list):
        return PhraseGoal(str(value.get("name") or kind), phrases(_texts(what, kind), ignore_case=ignore_case), wanted)
    if kind == "phrases":
        found = read_phrases(folder / str(what), ignore_case=ignore_case)
        return PhraseGoal(str(value.get("name") or what), found, wanted)
    if isinstance(what, list):
        what = ("," if kind == "script" else "").join(_texts(what, kind))
    return phrase_goal(kind, str(what), wanted, ignore_case=ignore_case)


def _lines(value: Any, folder: Path, what: str) -> list[str]:
    if isinstance(value, list):
        return list(_texts(value, what))
    return text_of(folder / str(value), f"`{what}` {value}").splitlines()


def _texts(values: Iterable[Any], what: str) -> Iterable[str]:
    """The same, once each is text: YAML reads `yes`, `007` and `Write a story: a fox` as something else.

    Raises:
        XFactorError: one is none.
    """
    for value in values:
        if not isinstance(value, str):
            raise XFactorError(f"`{what}`: {value!r} is what YAML reads where a text is meant; put that into quotes")
        yield value


def _number(setting: Any) -> Any:
    """A setting; 1e-3, which YAML takes for a text, as the number that it is."""
    try:
        return float(setting) if isinstance(setting, str) else setting
    except ValueError:
        return setting


def _goal_record(goal: PhraseGoal) -> dict[str, Any]:
    kind, texts = goal.patterns[0].kind, [pattern.text for pattern in goal.patterns]
    if kind == "phrase":
        return {
            "phrases": texts,
            "rate": goal.wanted.text(),
            "name": goal.name,
            "ignore_case": goal.patterns[0].ignore_case,
        }
    return {"script" if kind == "script" else "chars": texts, "rate": goal.wanted.text()}
