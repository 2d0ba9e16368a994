"""The adapters in a folder: what they are, renaming, removing."""

from __future__ import annotations

import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import XFactorError
from .adapter import AdapterInfo, find_adapter, list_adapters, read_adapter
from .files import CARD, RECORD, WEIGHTS, write_json


@dataclass(frozen=True)
class Entry:
    """One adapter of the catalogue; `problem` says why it could not be read, and the rest is empty then."""

    name: str
    base: str = ""
    tokens: str = ""
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
    rule = info.token_rule
    return Entry(
        info.name,
        base=info.identity.name if info.identity else info.config.get("base_model_name_or_path") or "",
        tokens=rule.describe() if rule else "",
        rate=info.section("after").get("rate"),
        parameters=parameter_count(info),
    )


def parameter_count(info: AdapterInfo) -> int:
    """Numbers stored in the adapter."""
    return sum(math.prod(shape) for shape in info.shapes.values())


def facts(info: AdapterInfo) -> dict[str, Any]:
    """What `adapters show` prints, by label; only what is known."""
    record, config = info.record, info.config
    after, train, rule = info.section("after"), info.section("train"), info.token_rule
    ranks = sorted({shape[0] for key, shape in info.shapes.items() if shape and key.endswith("lora_A.weight")})
    targets = config["target_modules"]
    found = {
        "folder": str(info.folder),
        "base": str(info.identity) if info.identity else config.get("base_model_name_or_path"),
        "tokens": rule and f"{rule.describe()}, {record['tokens']['size']} of {record['tokens']['vocab_size']}",
        "layers": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        "rank": ", ".join(map(str, ranks)),
        "alpha": config.get("lora_alpha"),
        "parameters": f"{parameter_count(info):,}",
        "training": train and "{steps} steps of {batch_size} x {seq_len} tokens, learning rate {lr:g}".format(**train),
        "R": after and f"{after['rate']:.4f} ({after['interval'][0]:.4f} to {after['interval'][1]:.4f})",
        "KL from base": after and f"{after['kl_from_base']:.4f} nats/token",
        "mixed from": ", ".join(f"{part['name']}:{part['weight']:g}" for part in record.get("mixed_from") or ()),
        "created": record.get("created"),
        "sha256": info.section("sha256").get(WEIGHTS),
    }
    return {label: value for label, value in found.items() if value}


def rename_adapter(name: str, new: str, root: Path) -> Path:
    """Give an adapter below `root` another name, in its record and card too; returns the new folder.

    Raises:
        XFactorError: there is no such adapter, the name is taken or is not a plain folder name.
    """
    folder, target = _below(name, root), root / new
    if not re.fullmatch(r"[\w.+-]+", new, flags=re.ASCII) or new.startswith("."):
        raise XFactorError(f"{new!r} is no name for an adapter; use letters, digits, and . + - _ inside")
    if target.exists():
        raise XFactorError(f"{target} exists; remove it first, or choose another name")
    info = read_adapter(folder)
    os.rename(folder, target)
    if info.record:
        write_json(target / RECORD, {**info.record, "name": new})
    if (target / CARD).is_file():
        card = (target / CARD).read_text(encoding="utf-8")
        (target / CARD).write_text(card.replace(f"\n# {name}\n", f"\n# {new}\n", 1), encoding="utf-8")
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
