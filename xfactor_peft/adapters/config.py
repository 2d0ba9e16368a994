"""What `adapter_config.json` may say, and PEFT's configuration made anew from it.

Of the file only the values below reach PEFT. The layers are those that the file of weights holds, so a configuration
cannot make PEFT allocate more than is stored, match a regular expression of a stranger's, import a module or change the
base's weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key

from ..errors import XFactorError

Check = Callable[[Any], bool]
_PATTERN = re.compile(r"\^?[\w\-]+(\\?\.[\w\-]+)*\$?", re.ASCII)
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
# Features of PEFT that change more than W + s B A, or other parts of the model.
_REFUSED = (
    "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices", "megatron_config",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "velora_config",
)  # fmt: skip


def check_config(config: dict[str, Any], where: str) -> None:
    """Check types, ranges and features.

    Raises:
        XFactorError: names the key, the value, and what was expected.
    """
    if config.get("peft_type") != "LORA":
        raise XFactorError(f"{where}: peft type {_short(config.get('peft_type'))} is not supported, only LORA is")
    initial = config.get("init_lora_weights")
    if initial in ("pissa", "olora", "corda", "loftq"):
        raise XFactorError(
            f"{where}: its initialisation, {initial}, changes the base's weights; save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    if (isinstance(initial, list | dict | int | float) and not isinstance(initial, bool)) or initial not in _INITIAL:
        raise XFactorError(f"{where}: init_lora_weights {_short(initial)} is not supported")
    for key in _REFUSED:
        if config.get(key):
            raise XFactorError(f"{where}: {key} is not supported; only plain LoRA, DoRA and rsLoRA are")
    if config.get("bias", "none") != "none":
        raise XFactorError(f"{where}: bias {_short(config['bias'])} is not supported, only none is")
    _expect(where, config, "r", _is_rank, "a whole number from 1 to 65536", required=True)
    _expect(where, config, "lora_alpha", _is_number, "a finite number", required=True)
    _expect(where, config, "lora_dropout", lambda v: _is_number(v) and 0 <= v < 1, "at least 0 and below 1")
    for key in ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "inference_mode"):
        _expect(where, config, key, lambda v: isinstance(v, bool), "true or false")
    for key, check in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        _expect(where, config, key, partial(_is_pattern, check=check), "plain layer names with numbers")
    _expect(where, config, "target_modules", _is_targets, "a list of layer names", required=True)
    for key in ("base_model_name_or_path", "revision"):
        _expect(where, config, key, lambda v: isinstance(v, str), "text")


def check_layers(config: dict[str, Any], shapes: dict[str, dict[str, tuple[int, ...]]], where: str) -> None:
    """Compare the stored tensors of every layer with the configuration.

    Args:
        shapes: layer -> part ("A.weight", "B.weight", "B.bias", "magnitude") -> shape.

    Raises:
        XFactorError: a part is missing or too much, or a rank is not the configuration's.
    """
    patterns = config.get("rank_pattern") or {}
    for layer, parts in shapes.items():
        wanted = {"A.weight", "B.weight"} | ({"magnitude"} if config.get("use_dora") else set())
        if missing := wanted - parts.keys():
            raise XFactorError(f"{where} is damaged: {layer} has no {sorted(missing)[0]}")
        allowed = wanted | ({"B.bias"} if config.get("lora_bias") else set())
        if extra := parts.keys() - allowed:
            raise XFactorError(f"{where} is damaged: {layer} has a {sorted(extra)[0]} that its configuration has not")
        rank = patterns.get(get_pattern_key(list(patterns), layer), config["r"])
        found = (parts["A.weight"][0], parts["B.weight"][-1])
        if found != (rank, rank):
            raise XFactorError(f"{where} is damaged: {layer} is of rank {found[0]} and {found[1]}, not {rank}")


def leaves_out(config: dict[str, Any], layers: set[str], linears: set[str]) -> tuple[str, bool] | None:
    """A layer that the configuration names and the weights lack, or the other way round; None when they agree.

    Returns (layer, named). A configuration whose choice takes more than names (a regular expression, "all-linear",
    exclusions, layer numbers) is not evaluated: its layers are those stored.
    """
    targets = config["target_modules"]
    chosen_otherwise = any(config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern"))
    if isinstance(targets, str) or chosen_otherwise:
        return None
    named = {name for name in linears if any(name == t or name.endswith(f".{t}") for t in targets)}
    if named == layers:
        return None
    layer = sorted(named ^ layers)[0]
    return layer, layer in named


def peft_config(config: dict[str, Any], layers: set[str]) -> LoraConfig:
    """PEFT's configuration for the stored layers, from checked values alone."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config.get("lora_dropout") or 0.0,
        target_modules=sorted(layers),
        fan_in_fan_out=config.get("fan_in_fan_out") or False,
        use_rslora=config.get("use_rslora") or False,
        use_dora=config.get("use_dora") or False,
        lora_bias=config.get("lora_bias") or False,
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        base_model_name_or_path=config.get("base_model_name_or_path"),
        inference_mode=True,
    )


def _expect(
    where: str, config: dict[str, Any], key: str, check: Check, expected: str, *, required: bool = False
) -> None:
    value = config.get(key)
    if (value is None and not required) or (value is not None and check(value)):
        return
    raise XFactorError(f"{where}: {key} must be {expected}; got {_short(value)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65536


def _is_pattern(value: Any, check: Check) -> bool:
    """Names with at most ^, $ and escaped dots: PEFT matches them as regular expressions."""
    return isinstance(value, dict) and all(_PATTERN.fullmatch(key) and check(number) for key, number in value.items())


def _is_targets(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and 0 < len(names) <= 10_000 and all(isinstance(name, str) for name in names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
