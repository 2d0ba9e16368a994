"""What `adapter_config.json` may say.

Of the file only the values below are used (see `bank.adapter_layers.peft_config`). The layers are those that the file
of weights holds, so a configuration cannot make PEFT allocate more than is stored, match a regular expression of a
stranger's, import a module or change the base's weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from ..errors import XFactorError
from .values import is_number, is_text, is_whole, shown

_PATTERN = re.compile(r"\^?[\w\-]+(\\?\.[\w\-]+)*\$?", re.ASCII)
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
        raise XFactorError(f"{where}: peft type {shown(config.get('peft_type'))} is not supported, only LORA is")
    initial = config.get("init_lora_weights")
    if initial in ("pissa", "olora", "corda", "loftq"):
        raise XFactorError(
            f"{where}: its initialisation, {initial}, changes the base's weights; save it with "
            "PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    if not (initial is None or isinstance(initial, bool) or initial in ("gaussian", "eva", "orthogonal")):
        raise XFactorError(f"{where}: init_lora_weights {shown(initial)} is not supported")
    for key in _REFUSED:
        if config.get(key):
            raise XFactorError(f"{where}: {key} is not supported; only plain LoRA, DoRA and rsLoRA are")
    if config.get("bias", "none") != "none":
        raise XFactorError(f"{where}: bias {shown(config['bias'])} is not supported, only none is")
    for key, (check, expected) in _VALUES.items():
        value = config.get(key)
        if key in _REQUIRED if value is None else not check(value):
            raise XFactorError(f"{where}: {key} must be {expected}; got {shown(value)}")


def _is_rank(value: Any) -> bool:
    return is_whole(value) and 1 <= value <= 65536


def _is_pattern(value: Any, check: Callable[[Any], bool]) -> bool:
    """Names with at most ^, $ and escaped dots: PEFT matches them as regular expressions."""
    return isinstance(value, dict) and all(_PATTERN.fullmatch(key) and check(number) for key, number in value.items())


def _is_targets(value: Any) -> bool:
    return is_text(value) or (isinstance(value, list) and 0 < len(value) <= 10_000 and all(map(is_text, value)))


_REQUIRED = ("r", "lora_alpha", "target_modules")
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number from 1 to 65536"),
    "lora_alpha": (is_number, "a finite number"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "at least 0 and below 1"),
    **dict.fromkeys(
        ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "inference_mode"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    "rank_pattern": (lambda value: _is_pattern(value, _is_rank), "plain layer names with numbers"),
    "alpha_pattern": (lambda value: _is_pattern(value, is_number), "plain layer names with numbers"),
    "target_modules": (_is_targets, "a list of layer names"),
    "base_model_name_or_path": (is_text, "text"),
    "revision": (is_text, "text"),
}


def of_layer(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """What PEFT's patterns say of a layer: the first that is all of its name, or the end of it behind a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def layer_scaling(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)."""
    alpha = of_layer(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
