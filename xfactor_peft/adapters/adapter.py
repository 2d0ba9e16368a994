"""Adapter folders, found by name and read: PEFT's own files, and a record of base, token set and training."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..base.identity import BaseIdentity
from ..errors import XFactorError
from ..tokens.rule import Rule
from .config import check_config
from .files import CONFIG, RECORD, WEIGHTS, read_json, read_shapes
from .record import check_record

_SIDE = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_[AB]\.(weight|bias)")


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter folder that was read and found whole.

    `identity` and the token rule in `record` are missing for adapters that plain PEFT wrote.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    identity: BaseIdentity | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def section(self, name: str) -> dict[str, Any]:
        """A part of the record, empty where it is not there."""
        return self.record.get(name) or {}

    @property
    def token_rule(self) -> Rule | None:
        """What chose the token set that it was trained for."""
        rule = self.section("tokens").get("rule")
        return rule and Rule.from_record(rule)

    @property
    def token_records(self) -> list[dict[str, Any]]:
        """What is recorded of the token set of every goal, or of the one set of an adapter without goals."""
        goals = self.section("target").get("goals") or []
        return [goal["tokens"] for goal in goals] or ([self.section("tokens")] if self.token_rule else [])


def find_adapter(reference: str, root: Path = Path("adapters")) -> Path:
    """The folder of an adapter given by path, or by name below `root`.

    Raises:
        XFactorError: neither exists; lists the names that do.
    """
    for folder in (root / reference, Path(reference)):
        if (folder / CONFIG).is_file():
            return folder
    if (Path(reference) / "config.json").is_file():
        raise XFactorError(f"`adapter={reference}` is a whole model, not an adapter; use it as `model={reference}`")
    for folder in (root / reference, Path(reference)):
        if reference and folder.is_dir():
            inside = [f"{folder / name}" for name in list_adapters(folder)]
            held = _few(sorted(path.name for path in folder.iterdir())) or "nothing"
            what = f"the adapters in it are {_few(inside)}; give one of them" if inside else f"it holds {held}"
            raise XFactorError(f"`adapter={reference}`: {folder} has no {CONFIG}, so it is no adapter; {what}")
    names = list_adapters(root)
    known = ", ".join(names) or "none"
    meant = "".join(f"; did you mean {near}?" for near in get_close_matches(reference, names, n=1))
    raise XFactorError(
        f"`adapter={reference}`: no such adapter in {root}/ and no such folder; there are: {known}{meant}"
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def list_adapters(root: Path = Path("adapters")) -> list[str]:
    """Names of the adapters below `root`; hidden folders are none, they hold what is not finished."""
    return sorted(path.parent.name for path in root.glob(f"[!.]*/{CONFIG}"))


def read_adapter(folder: Path) -> AdapterInfo:
    """Read an adapter's files without touching any model.

    Raises:
        XFactorError: a file is missing, unreadable, not LoRA, or holds values that are not finite.
    """
    config = read_json(folder / CONFIG)
    check_config(config, f"{folder}/{CONFIG}")
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    identity = None
    if record:
        check_record(record, f"{folder}/{RECORD}")
        identity = BaseIdentity(**{key: record["base"].get(key) for key in BaseIdentity.__dataclass_fields__})
        named = config.get("base_model_name_or_path")
        if named and named != identity.name:
            raise XFactorError(f"{folder}: {CONFIG} names the base {named!r}, but {RECORD} names {identity.name!r}")
    return AdapterInfo(folder.name, folder, config, read_shapes(folder / WEIGHTS), identity, record)


def layers_of(info: AdapterInfo) -> set[str]:
    """Full names of the layers that an adapter holds weights for."""
    return {match["layer"] for key in info.shapes if (match := _SIDE.fullmatch(key))}
