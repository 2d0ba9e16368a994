"""Does an adapter fit a base? Every tensor is compared with the layer it is for, before anything is loaded."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.loading import Base
from ..checkpoint.durable import file_hash
from ..errors import XFactorError, XFactorWarning
from .adapter import AdapterInfo
from .config import of_layer
from .files import CONFIG, RECORD, WEIGHTS

_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_((?P<side>[AB])\.(?P<kind>weight|bias)|"
                     r"(?P<magnitude>magnitude_vector)(\.weight)?)")  # fmt: skip
_Shape = tuple[int, ...]


def check_fits(info: AdapterInfo, base: Base) -> None:
    """Check an adapter against a base model.

    Raises:
        XFactorError: it was made for another base or tokenizer (both are named), a shape differs, a tensor is missing
            or unexpected, or a file is not the one that was saved.
    """
    _check_base(info, base)
    where = f"adapter {info.name}"
    layers: dict[str, dict[str, _Shape]] = {}
    for key, shape in info.shapes.items():
        match = _TENSOR.fullmatch(key)
        if match is None:
            raise XFactorError(f"{where}: unexpected tensor {key}")
        inputs, outputs = _layer_size(base.model, match["layer"], where)
        part = "magnitude" if match["magnitude"] else f"{match['side']}.{match['kind']}"
        dimensions, axis, wanted = {
            "A.weight": (2, -1, inputs), "A.bias": (1, -1, inputs),
            "B.weight": (2, 0, outputs), "B.bias": (1, 0, outputs), "magnitude": (1, 0, outputs),
        }[part]  # fmt: skip
        if len(shape) != dimensions or shape[axis] != wanted:
            raise XFactorError(
                f"{where}: {key} has shape {shape}, which does not fit the layer of {base.identity} ({inputs} in, "
                f"{outputs} out)"
            )
        layers.setdefault(match["layer"], {})[part] = shape
    for layer, parts in layers.items():
        _check_layer(info.config, layer, parts, where)
    _check_choice(info.config, set(layers), base.model, where)
    recorded = info.section("sha256")
    for name in (CONFIG, WEIGHTS):
        if name in recorded and recorded[name] != file_hash(info.folder / name):
            raise XFactorError(
                f"{where}: {name} changed since it was saved (its SHA-256 in {RECORD} is another); if that "
                f"was meant, remove sha256 from {RECORD}"
            )


def _check_base(info: AdapterInfo, base: Base) -> None:
    """By the fingerprints that were recorded, or, for an adapter that plain PEFT wrote, by the base's name."""
    if info.identity is not None:
        if differences := info.identity.differences(base.identity):
            raise XFactorError(
                f"adapter {info.name} was made for {info.identity}, but the model here is {base.identity}; "
                f"different: {', '.join(differences)}; give the base that it was made for as `model`"
            )
        if info.identity.requantised(base.identity):
            line = f"adapter {info.name} was made for another quantisation of this model, {info.identity}"
            warnings.warn(f"{line}; its rates may differ a little", XFactorWarning, stacklevel=4)
        return
    named = info.config.get("base_model_name_or_path")
    if named and Path(named).name != Path(base.choice.name).name:
        raise XFactorError(
            f"adapter {info.name}: its {CONFIG} names the base {named!r}, but the model here is {base.choice.name}; if "
            "they are the same, correct base_model_name_or_path"
        )


def _check_layer(config: dict[str, Any], layer: str, parts: dict[str, _Shape], where: str) -> None:
    """Both sides are there, of the configuration's rank, and nothing that it does not speak of."""
    wanted = {"A.weight", "B.weight"} | ({"magnitude"} if config.get("use_dora") else set())
    if missing := wanted - parts.keys():
        raise XFactorError(f"{where} is damaged: {layer} has no {sorted(missing)[0]}")
    allowed = wanted | ({"B.bias"} if config.get("lora_bias") else set())
    if extra := parts.keys() - allowed:
        raise XFactorError(f"{where} is damaged: {layer} has a {sorted(extra)[0]} that its configuration has not")
    rank = of_layer(config.get("rank_pattern") or {}, layer, config["r"])
    found = (parts["A.weight"][0], parts["B.weight"][-1])
    if found != (rank, rank):
        raise XFactorError(f"{where} is damaged: {layer} is of rank {found[0]} and {found[1]}, not {rank}")


def _check_choice(config: dict[str, Any], stored: set[str], model: nn.Module, where: str) -> None:
    """The layers that the configuration names are those that are stored.

    A configuration whose choice takes more than names (a regular expression, "all-linear", exclusions, layer numbers)
    is not evaluated: its layers are those stored.
    """
    targets = config["target_modules"]
    if isinstance(targets, str) or any(
        config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern")
    ):
        return
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D | LoraLayer)}
    linear = {name for name in linear if ".lora_" not in name and not name.endswith(".base_layer")}
    named = {name for name in linear if any(name == target or name.endswith(f".{target}") for target in targets)}
    if named != stored:
        layer = sorted(named ^ stored)[0]
        what = "no weights for" if layer in named else "weights for a layer that its configuration leaves out,"
        raise XFactorError(f"{where} is damaged: it holds {what} {layer}")


def _layer_size(model: nn.Module, path: str, where: str) -> tuple[int, int]:
    """(in, out) of a linear layer of the base, also when LoRA wraps it already."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise XFactorError(f"{where}: the model has no layer {path}") from error
    layer = getattr(module, "base_layer", module)
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv1D):  # GPT-2's, which keeps (in, out)
        return layer.weight.shape[0], layer.weight.shape[1]
    raise XFactorError(f"{where}: {path} is not a linear layer of the model")
