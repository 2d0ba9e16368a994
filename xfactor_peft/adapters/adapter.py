"""Adapters on disk: PEFT's own files, plus what is needed to refuse the wrong base."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.identity import BaseIdentity
from ..base.loading import Base
from ..errors import XFactorError
from .config import check_config, check_layers, leaves_out
from .files import CONFIG, RECORD, WEIGHTS, read_json, read_shapes
from .output import file_hash
from .record import check_record

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.(?P<kind>weight|bias)")

_MAGNITUDE = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_magnitude_vector(\.weight)?")


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

    @property
    def token_rule(self) -> dict[str, Any] | None:
        return self.record.get("tokens", {}).get("rule")


def find_adapter(reference: str, root: Path = Path("adapters")) -> Path:
    """The folder of an adapter given by path, or by name below `root`.

    Raises:
        XFactorError: neither exists; lists the names that do.
    """
    for folder in (root / reference, Path(reference)):
        if (folder / CONFIG).is_file():
            return folder
    if (Path(reference) / "config.json").is_file():
        raise XFactorError(f"--adapter {reference} is a whole model, not an adapter; use it as --model {reference}")
    known = ", ".join(list_adapters(root)) or "none"
    raise XFactorError(f"--adapter {reference}: no such adapter in {root}/ and no such folder; there are: {known}")


def list_adapters(root: Path = Path("adapters")) -> list[str]:
    """Names of the adapters below `root`."""
    return sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))


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
        identity = BaseIdentity(**{key: record["base"][key] for key in BaseIdentity.__dataclass_fields__})
        named = config.get("base_model_name_or_path")
        if named and named != identity.name:
            raise XFactorError(f"{folder}: {CONFIG} names the base {named!r}, but {RECORD} names {identity.name!r}")
    return AdapterInfo(folder.name, folder, config, read_shapes(folder / WEIGHTS), identity, record)


def check_fits(info: AdapterInfo, base: Base) -> None:
    """Check an adapter against a base model before anything is loaded.

    Raises:
        XFactorError: it was made for another base or tokenizer (both are named), a shape differs, a tensor is missing
            or too much, or a file is not the one that was saved.
    """
    named = info.config.get("base_model_name_or_path")
    if info.identity is None and named and Path(named).name != Path(base.choice.name).name:
        raise XFactorError(
            f"adapter {info.name}: its {CONFIG} names the base {named!r}, but the model here is {base.choice.name}; if "
            "they are the same, correct base_model_name_or_path"
        )
    if info.identity is not None:
        differences = info.identity.differences(base.identity)
        if differences:
            raise XFactorError(
                f"adapter {info.name} was made for {info.identity}, but the model here is {base.identity}; "
                f"different: {', '.join(differences)}. Load the base it was made for with --model"
            )
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in info.shapes.items():
        if match := _MAGNITUDE.fullmatch(key):
            outputs = _layer_shape(base.model, match["module"], info.name)[1]
            if shape != (outputs,):
                raise XFactorError(
                    f"adapter {info.name}: {key} has shape {shape}, which does not fit {outputs} outputs"
                )
            parts.setdefault(match["module"], {})["magnitude"] = shape
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise XFactorError(f"adapter {info.name}: unexpected tensor {key}")
        expected = _layer_shape(base.model, match["module"], info.name)
        wanted = expected[0] if match["side"] == "A" else expected[1]
        dimensions = 1 if match["kind"] == "bias" else 2
        if len(shape) != dimensions or shape[-1 if match["side"] == "A" else 0] != wanted:
            raise XFactorError(
                f"adapter {info.name}: {key} has shape {shape}, which does not fit the layer of "
                f"{base.identity} ({expected[0]} in, {expected[1]} out)"
            )
        parts.setdefault(match["module"], {})[f"{match['side']}.{match['kind']}"] = shape
    check_layers(info.config, parts, f"adapter {info.name}")
    if found := leaves_out(info.config, set(parts), _linear_names(base.model)):
        what = "no weights for" if found[1] else "weights for a layer that its configuration leaves out,"
        raise XFactorError(f"adapter {info.name} is damaged: it holds {what} {found[0]}")
    recorded = info.record.get("sha256", {})
    for name in (CONFIG, WEIGHTS):
        if name in recorded and recorded[name] != file_hash(info.folder / name):
            raise XFactorError(
                f"adapter {info.name}: {name} changed since it was saved (its SHA-256 in {RECORD} is another); if that "
                f"was meant, remove sha256 from {RECORD}"
            )


def layers_of(info: AdapterInfo) -> set[str]:
    """Full names of the layers that an adapter holds weights for."""
    return {match["module"] for key in info.shapes if (match := _KEY.fullmatch(key))}


def _layer_shape(model: nn.Module, path: str, name: str) -> tuple[int, int]:
    """(in, out) of a linear layer of the base, also when LoRA wraps it already."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise XFactorError(f"adapter {name}: the model has no layer {path}") from error
    layer = getattr(module, "base_layer", module)
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):  # GPT-2's, which keeps (in, out)
        return layer.weight.shape[0], layer.weight.shape[1]
    raise XFactorError(f"adapter {name}: {path} is not a linear layer of the model")


def _linear_names(model: nn.Module) -> set[str]:
    """Names of the layers that LoRA can be on, wrapped already or not."""
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or hasattr(module, "in_features")) and not _of_lora(name)
    }


def _of_lora(name: str) -> bool:
    """Whether a module is a part of a LoRA layer."""
    return ".lora_" in name or name.endswith(".base_layer")
