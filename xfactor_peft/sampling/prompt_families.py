"""Families of prompts: the kinds of text after which a rate is to hold.

A bundled set, `prompt_families.json`, written for this package, in two parts: one to calibrate on and one, of eight
other groups, that only ever measures. Or the user's own file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..base.loading import Base
from ..errors import XFactorError, text_of
from ..options import ChatOptions
from ..tokens.ends import text_ids
from .chat import question
from .contexts import tokens_left

FIT, HELD_OUT = "fit", "held-out"
OPENINGS = "openings"
"""The family of the model's own beginnings of texts."""
MOST_FAMILIES = 64
"""Families that a rate is calibrated on at most: texts are drawn after the prompts of each."""
_BUNDLED = Path(__file__).with_suffix(".json")
_KEYS = {"prompt": str, "family": str, "chat": bool}


@dataclass(frozen=True)
class PromptFamily:
    """Prompts of one kind; with `chat` each is a question in the tokenizer's chat template, where it has one."""

    name: str
    prompts: tuple[str, ...]
    chat: bool = False

    def ids(self, tokenizer: PreTrainedTokenizerBase, most: int) -> list[list[int]]:
        """Ids of every prompt, of a longer one the last `most`."""
        if self.chat and getattr(tokenizer, "chat_template", None) is not None:
            encoded = [question(tokenizer, prompt, ChatOptions("on")) for prompt in self.prompts]
        else:
            encoded = [text_ids(tokenizer, prompt) for prompt in self.prompts]
        return [ids[-most:] for ids in encoded if ids]


def bundled(part: str) -> list[PromptFamily]:
    """The bundled families of a part, `FIT` or `HELD_OUT`."""
    groups = json.loads(_BUNDLED.read_text(encoding="utf-8"))[part]
    return [PromptFamily(name, tuple(prompts), chat=name == "chat") for name, prompts in groups.items()]


def read_families(path: Path) -> list[PromptFamily]:
    """The families of a user's file.

    Plain text has one prompt a line, and an empty line between families. JSON lines, which begin with "{", are objects
    {"prompt": text, "family": name, "chat": true or false}, the last two optional.

    Raises:
        XFactorError: the file cannot be read, a line has another form, or there is no prompt.
    """
    return families_of(text_of(path, f"`prompts={path}`"), path)


def families_of(text: str, path: Path) -> list[PromptFamily]:
    """The families of a text in either form, read from `path`; raises XFactorError as `read_families` does."""
    families = _of_json(text, path) if text.lstrip().startswith("{") else _of_blocks(text)
    if not families:
        raise XFactorError(f"`prompts={path}` holds no prompt")
    return families


def _of_blocks(text: str) -> list[PromptFamily]:
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [PromptFamily(str(number), tuple(block)) for number, block in enumerate(filter(None, blocks), start=1)]


def _of_json(text: str, path: Path) -> list[PromptFamily]:
    groups: dict[tuple[str, bool], list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            raise XFactorError(
                f'`prompts={path}`, line {number}: expected {{"prompt": text, "family": name, "chat": true or false}}, '
                "the last two optional"
            )
        groups.setdefault((row.get("family", "prompts"), row.get("chat", False)), []).append(row["prompt"])
    if mixed := {name for name, chat in groups if (name, not chat) in groups}:
        raise XFactorError(f"`prompts={path}`: family {min(mixed)!r} mixes chat and plain prompts; give them two names")
    return [PromptFamily(name, tuple(prompts), chat) for (name, chat), prompts in groups.items()]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and all(isinstance(value, _KEYS.get(key, ())) for key, value in row.items())
    return row if known and row.get("prompt") else None


def encode(base: Base, families: Iterable[PromptFamily], length: int) -> dict[str, list[list[int]]]:
    """Ids of every family's prompts by its name; prompts are cut so that `length` tokens still fit behind them.

    Raises:
        XFactorError: a family of the user's has no token at all.
    """
    most, found = max(1, tokens_left(base, length)), {}
    for family in families:
        found[family.name] = family.ids(base.tokenizer, most)
        if not found[family.name]:
            raise XFactorError(f"`prompts`: family {family.name!r} holds no token; give it a prompt")
    return found


def fitting_prompts(base: Base, openings: torch.Tensor, file: str | None, length: int) -> dict[str, list[list[int]]]:
    """What a rate is calibrated on: the user's families, or the model's own openings (N, P) and the bundled ones.

    Raises:
        XFactorError: the file as in `read_families` and `encode`, or more than `MOST_FAMILIES` in it.
    """
    if file is not None:
        families = read_families(Path(file))
        if len(families) > MOST_FAMILIES:
            raise XFactorError(
                f"`prompts={file}` holds {len(families)} kinds of prompts, a rate takes at most {MOST_FAMILIES}; join "
                "some: an empty line begins a new kind"
            )
        return encode(base, families, length)
    return {OPENINGS: openings.tolist(), **encode(base, bundled(FIT), length)}
