"""Adapters on disk: PEFT's own files, plus what is needed to refuse the wrong base."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .card import model_card
from .durable import sync, sync_tree
from .errors import XFactorError
from .identity import BaseIdentity
from .loading import Base
from .training import TrainResult

RECORD = "xfactor.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
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


def prepare_output(folder: Path, *, force: bool) -> Path:
    """Check that `folder` may be written, and return an empty staging folder beside it.

    Raises:
        XFactorError: the folder exists and `force` is off, or its parent cannot be written.
    """
    if folder.exists() and not force:
        raise XFactorError(f"{folder} exists; pass --force to replace it, or --output for another place")
    if folder.exists() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise XFactorError(f"{folder} holds something that is not a run of this tool; --force does not replace it")
    staging = staging_of(folder)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise XFactorError(f"{folder.parent} cannot be written: {error.strerror or error}; choose --output") from error
    return staging


def staging_of(folder: Path) -> Path:
    """Where `folder` is made before it takes its name."""
    return folder.parent / f".{folder.name}.partial"


def publish(staging: Path, folder: Path) -> None:
    """Move a finished staging folder into place, whole on the disk; an old one is removed only after that."""
    sync_tree(staging)
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(staging, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def save_result(result: TrainResult, staging: Path, name: str) -> dict[str, Any]:
    """Write a trained adapter (or, for full fine-tuning, the whole model) into `staging`; returns the record.

    An adapter is `adapter_config.json` and `adapter_model.safetensors` as PEFT writes them, `xfactor.json`
    (base identity, token rule and hash, settings, scores) and a model card, `README.md`.
    """
    record = {
        "format": 1,
        "name": name,
        "kind": result.options.method,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        **result.record(),
    }
    if result.options.method == "lora":
        for config in result.model.peft_config.values():
            config.base_model_name_or_path = result.base.choice.name
            config.revision = result.base.choice.revision
        result.model.save_pretrained(staging, save_embedding_layers=False)
    else:
        result.model.save_pretrained(staging)
        result.base.tokenizer.save_pretrained(staging)
    record["sha256"] = hashes(staging)
    write_record(staging, record)
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Put `xfactor.json` and the model card beside the weights."""
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the configuration and every file of weights, by name."""
    paths = [*sorted(folder.glob("*.safetensors")), folder / CONFIG]
    return {path.name: file_hash(path) for path in paths if path.is_file()}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    config = _read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise XFactorError(f"{folder}: peft type {config.get('peft_type')!r} is not supported, only LORA is")
    if config.get("init_lora_weights") in ("pissa", "olora", "corda", "loftq"):
        raise XFactorError(
            f"{folder}: its initialisation, {config['init_lora_weights']}, changes the base's weights; save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    record = _read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    try:
        fields = BaseIdentity.__dataclass_fields__
        identity = BaseIdentity(**{key: record["base"][key] for key in fields}) if record else None
    except (KeyError, TypeError) as error:
        raise XFactorError(f"{folder}/{RECORD} is damaged: no {error} under base") from error
    return AdapterInfo(folder.name, folder, config, _read_shapes(folder / WEIGHTS), identity, record)


def check_fits(info: AdapterInfo, base: Base) -> None:
    """Check an adapter against a base model before anything is loaded.

    Raises:
        XFactorError: it was made for another base or tokenizer (both are named), or a shape differs.
    """
    if info.identity is not None:
        differences = info.identity.differences(base.identity)
        if differences:
            raise XFactorError(
                f"adapter {info.name} was made for {info.identity}, but the model here is {base.identity}; "
                f"different: {', '.join(differences)}. Load the base it was made for with --model"
            )
    for key, shape in info.shapes.items():
        if match := _MAGNITUDE.fullmatch(key):
            outputs = _layer_shape(base.model, match["module"], info.name)[1]
            if shape != (outputs,):
                raise XFactorError(
                    f"adapter {info.name}: {key} has shape {shape}, which does not fit {outputs} outputs"
                )
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise XFactorError(f"adapter {info.name}: unexpected tensor {key}")
        expected = _layer_shape(base.model, match["module"], info.name)
        side = shape[-1] if match["side"] == "A" else shape[0]
        wanted = expected[0] if match["side"] == "A" else expected[1]
        dimensions = 1 if match["kind"] == "bias" else 2
        if len(shape) != dimensions or side != wanted:
            raise XFactorError(
                f"adapter {info.name}: {key} has shape {shape}, which does not fit the layer of "
                f"{base.identity} ({expected[0]} in, {expected[1]} out)"
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
    module = getattr(module, "base_layer", module)
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)  # GPT-2's Conv1D keeps (in, out)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise XFactorError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise XFactorError(f"{path} must hold a JSON object")
    return value


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise XFactorError(f"{path} cannot be read as safetensors: {error}") from error
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise XFactorError(f"{path}: {key} holds NaN or infinity; train the adapter again")
    if not tensors:
        raise XFactorError(f"{path} holds no tensor")
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
