"""The adapters in a folder: what they are, renaming, removing."""

from __future__ import annotations

import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.durable import write_atomically
from ..errors import XFactorError
from ..tokens.rule import Rule
from .adapter import AdapterInfo, find_adapter, list_adapters, read_adapter
from .card import about, asked, renamed_card, steps_made
from .config import layer_scaling
from .files import CARD, RECORD, WEIGHTS, write_json
from .output import check_no_run


@dataclass(frozen=True)
class Entry:
    """One adapter of the catalogue; `problem` says why it could not be read, and the rest is empty then."""

    name: str
    base: str = ""
    tokens: str = ""
    wanted: str = ""
    rate: float | None = None
    parameters: int = 0
    problem: str | None = None


def catalogue(root: Path) -> list[Entry]:
    """Every adapter below `root`, damaged ones included."""
    return [_entry(root / name) for name in list_adapters(root)]


def _entry(folder: Path) -> Entry:
    try:
        info = read_adapter(folder)
    except XFactorError as error:
        return Entry(folder.name, problem=str(error))
    return Entry(
        info.name,
        base=info.identity.name if info.identity else info.config.get("base_model_name_or_path") or "",
        tokens="; ".join(
            [
                *(Rule.from_record(part["rule"]).describe() for part, _ in _sets(info)),
                *(about(goal, 2) for goal in _goals(info)),
            ]
        ),
        wanted="; ".join([*(wanted for _, wanted in _sets(info) if wanted), *map(asked, _goals(info))]),
        rate=info.section("after").get("rate"),
        parameters=parameter_count(info),
    )


def parameter_count(info: AdapterInfo) -> int:
    """Numbers stored in the adapter."""
    return sum(math.prod(shape) for shape in info.shapes.values())


def _sets(info: AdapterInfo) -> list[tuple[dict[str, Any], str]]:
    """The record of every token set of an adapter, and what was wanted of it: "10 %", "lambda 3", or nothing said."""
    goals = info.section("target").get("goals") or []
    return [(goal["tokens"], _wanted(goal)) for goal in goals] or [(part, "") for part in info.token_records]


def _goals(info: AdapterInfo) -> list[dict[str, Any]]:
    """The goals of an adapter for phrases."""
    return info.section("phrases").get("goals") or []


def _counts(info: AdapterInfo) -> str:
    """Occurrences of its patterns before and after, on prompts that training never saw."""
    before, after = (info.section("phrases").get(when) for when in ("before", "after"))
    if not before or not after:
        return ""
    low, high = after["interval"]
    return f"{before['per_1000_words']:.2f} before, {after['per_1000_words']:.2f} after ({low:.2f} to {high:.2f})"


def _wanted(goal: dict[str, Any]) -> str:
    if goal.get("rate") is not None:
        return f"{100 * goal['rate']:g} %"
    return f"lambda {goal['strength']:g}" if goal.get("strength") is not None else ""


def _tokens(part: dict[str, Any], wanted: str) -> str:
    rule = Rule.from_record(part["rule"]).describe()
    return f"{rule}, {part['size']} of {part['vocab_size']}" + (f"; wanted {wanted}" if wanted else "")


def facts(info: AdapterInfo) -> dict[str, Any]:
    """What `adapters show` prints, by label; only what is known."""
    record, config = info.record, info.config
    after, rate = info.section("after"), info.section("rate")
    sides = {key: shape[0] for key, shape in info.shapes.items() if shape and key.endswith("lora_A.weight")}
    layers = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): rank for key, rank in sides.items()}
    scaling = {layer_scaling(config, layer, rank) for layer, rank in layers.items() if rank}
    targets = config["target_modules"]
    found = {
        "folder": str(info.folder),
        "base": str(info.identity) if info.identity else config.get("base_model_name_or_path"),
        "tokens": "\n".join(_tokens(*pair) for pair in _sets(info)),
        "phrases": "\n".join(f"{about(goal)}: {asked(goal)}" for goal in _goals(info)),
        "in 1,000 words": _counts(info),
        "R": after and f"{after['rate']:.4f} ({after['interval'][0]:.4f} to {after['interval'][1]:.4f})",
        "KL from base": after and f"{after['kl_from_base']:.4f} nats/token",
        "lambda": ", ".join(f"{value:.4g}" for value in rate.get("strengths") or ()),
        "dial": "  ".join(f"{scale:g}: {measured:.4f}" for scale, measured in rate.get("dial") or ()),
        "layers": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        "rank": ", ".join(map(str, sorted(set(sides.values())))),
        "scaling": ", ".join(f"{value:.4g}" for value in sorted(scaling)),
        "parameters": f"{parameter_count(info):,}",
        "training": _training(info),
        "mixed from": ", ".join(f"{part['name']}:{part['weight']:g}" for part in record.get("mixed_from") or ()),
        "created": record.get("created"),
        "sha256": info.section("sha256").get(WEIGHTS),
    }
    return {label: value for label, value in found.items() if value}


def _training(info: AdapterInfo) -> str:
    return steps_made(info.record) if info.section("train") else ""


def rename_adapter(name: str, new: str, root: Path) -> Path:
    """Give an adapter below `root` another name, in its record and card too; returns the new folder.

    Raises:
        XFactorError: there is no such adapter, the name is taken, by an unfinished run too, or is no plain folder
            name; or the folder cannot be written, and is as it was.
    """
    folder, target = _below(name, root), root / new
    if not re.fullmatch(r"[\w.+-]+", new, flags=re.ASCII) or new.startswith("."):
        raise XFactorError(f"{new!r} is no name for an adapter; use letters, digits, and . + - _ inside")
    if target.exists():
        raise XFactorError(f"{target} exists; remove it first, or choose another name")
    check_no_run(target)
    info = read_adapter(folder)
    old: dict[str, bytes] = {}
    try:
        old |= {file: (folder / file).read_bytes() for file in (RECORD, CARD) if (folder / file).is_file()}
        if info.record:
            write_json(folder / RECORD, {**info.record, "name": new})
        if CARD in old:
            named = {name, str(info.record.get("name", name))}  # that of a pulled one says its name at its author's
            write_atomically(folder / CARD, renamed_card(old[CARD], named, new))
        os.rename(folder, target)
    except OSError as error:
        with suppress(OSError):
            for file, content in old.items():
                write_atomically(folder / file, content)
        raise XFactorError(f"{folder} cannot be renamed ({error.strerror}); it keeps its name") from error
    return target


def remove_adapter(name: str, root: Path) -> Path:
    """Delete an adapter's folder below `root`.

    Raises:
        XFactorError: there is no such adapter, or the folder holds folders of its own, which no adapter has.
    """
    folder = _below(name, root)
    if any(path.is_dir() for path in folder.iterdir()):
        raise XFactorError(f"{folder} holds other folders, so it is more than an adapter; delete it yourself")
    shutil.rmtree(folder)
    return folder


def _below(name: str, root: Path) -> Path:
    if name not in list_adapters(root):
        find_adapter(name, root)  # raises for an unknown one
        raise XFactorError(f"{name} is not in {root}/; `root` names the folder whose adapters are changed")
    return root / name
