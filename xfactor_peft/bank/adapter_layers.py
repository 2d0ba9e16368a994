"""Adapters in a model's LoRA layers: added whole or not at all, removed without a trace, activated in microseconds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from ..adapters.adapter import AdapterInfo, layers_of
from ..errors import XFactorError
from ..lora.wrap import register_layers
from ..lowmem.peft_parts import tuner


class AdapterLayers:
    """The LoRA layers of one model, under PEFT's names for adapters.

    `activate` sets what PEFT's `set_adapter`, `enable_adapter_layers` and `set_scale` would set, on a list of layers
    that is kept, because PEFT walks through every module and parameter of all resident adapters.
    """

    def __init__(self, model: PreTrainedModel, device: str) -> None:
        self.peft: PeftModel | None = None
        self._model, self._device = model, device
        self._layers: dict[str, LoraLayer] = {}

    def add(self, info: AdapterInfo, key: str) -> None:
        """Load an adapter's weights under `key`; it is not active yet.

        Raises:
            XFactorError: PEFT refuses it, or its layers and its weights do not match; everything is as before then.
        """
        try:
            self._load(info, key)
            self._index()
            self._check_complete(info, key)
        except BaseException as error:
            self.remove(key)
            if isinstance(error, RuntimeError | ValueError | KeyError | TypeError) and not isinstance(
                error, XFactorError
            ):
                reason = str(error).strip().split("\n")[0]
                raise XFactorError(f"adapter {info.name} cannot be loaded: {reason}") from error
            raise

    def remove(self, key: str) -> None:
        """Take an adapter out, whole or half loaded; layers without any are the base's own again."""
        self._index()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that it makes another one active; `activate` follows
            for name, layer in self._layers.items():
                layer._active_adapter = []
                layer.delete_adapter(key)
                if not layer.lora_A:
                    self._model.set_submodule(name, layer.base_layer)
        self._index()
        if self.peft is not None:
            self.peft.peft_config.pop(key, None)
            keys = list(self.peft.peft_config)[:1]
            self.peft.active_adapter, tuner(self.peft).active_adapter = next(iter(keys), ""), keys
        if not self._layers:
            self.peft = None
            if hasattr(self._model, "peft_config"):
                del self._model.peft_config

    def activate(self, weights: Mapping[str, float]) -> None:
        """W + sum over `weights` of (key, w): w s B A; an empty mapping is the base."""
        if self.peft is None:
            return
        keys = list(weights)
        for layer in self._layers.values():
            layer._active_adapter = keys
            layer._disable_adapters = not keys
            for key in keys:
                if key in layer.scaling:
                    layer.set_scale(key, weights[key])
        if keys:
            self.peft.active_adapter = keys[0]
            tuner(self.peft).active_adapter = keys

    def _load(self, info: AdapterInfo, key: str) -> None:
        config = register_layers(peft_config(info))
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(
                self._model, info.folder, adapter_name=key, config=config, torch_device=self._device
            )
        else:
            self.peft.add_adapter(key, config)
            self.peft.load_adapter(info.folder, adapter_name=key, torch_device=self._device)
        self.peft.eval().requires_grad_(False)

    def _index(self) -> None:
        self._layers = {name: m for name, m in self._model.named_modules() if isinstance(m, LoraLayer)}

    def _check_complete(self, info: AdapterInfo, key: str) -> None:
        made = {name for name, layer in self._layers.items() if key in layer.lora_A}
        stored = layers_of(info)
        if made != stored:
            name = sorted(made ^ stored)[0]
            what = "no weights for" if name in made else "weights for a layer that its configuration leaves out,"
            raise XFactorError(f"adapter {info.name} is damaged: it holds {what} {name}")


def peft_config(info: AdapterInfo) -> LoraConfig:
    """PEFT's configuration made anew for the stored layers, from the values that `adapters.config` checks alone."""
    config, layers = info.config, layers_of(info)
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
