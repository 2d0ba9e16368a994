"""Adapters in a model's LoRA layers: added whole or not at all, removed without a trace, activated in microseconds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from ..adapters.adapter import AdapterInfo, layers_of
from ..errors import XFactorError, first_line
from ..lora.wrap import register_layers
from ..lowmem.noise import without_notes
from ..lowmem.peft_parts import tuner

_REFUSALS = (RuntimeError, ValueError, KeyError, TypeError)
"""What PEFT raises for an adapter that it cannot load."""


class AdapterLayers:
    """The LoRA layers of one model, with what PEFT lacks for swapping.

    `add` is PEFT's loading, undone when it fails half-way. `remove` also restores layers that no adapter is on any
    more. `activate` sets what PEFT's `set_adapter`, `enable_adapter_layers` and `set_scale` would set, on a list of
    layers that is kept, because PEFT walks through every module and parameter of all resident adapters.
    """

    def __init__(self, model: PreTrainedModel, device: str) -> None:
        self.peft: PeftModel | None = None
        self._model, self._device = model, device
        self._layers: dict[str, LoraLayer] = {}

    def add(self, info: AdapterInfo, peft_name: str) -> None:
        """Load an adapter's weights under `peft_name`; it is not active yet.

        Raises:
            XFactorError: PEFT refuses it, or makes layers that it has no weights for; everything is as before then.
        """
        try:
            config = register_layers(peft_config(info))
            with without_notes():
                if self.peft is None:
                    self.peft = PeftModel.from_pretrained(
                        self._model, info.folder, adapter_name=peft_name, config=config, torch_device=self._device
                    )
                else:
                    self.peft.add_adapter(peft_name, config)
                    self.peft.load_adapter(info.folder, adapter_name=peft_name, torch_device=self._device)
            self.peft.eval().requires_grad_(False)
            self._index()
            made = {name for name, layer in self._layers.items() if peft_name in layer.lora_A}
            if extra := made - layers_of(info):
                raise XFactorError(f"adapter {info.name} is damaged: it holds no weights for {min(extra)}")
        except BaseException as error:
            self.remove(peft_name)
            if isinstance(error, XFactorError) or not isinstance(error, _REFUSALS):
                raise
            raise XFactorError(f"adapter {info.name} cannot be loaded: {first_line(error)}") from error

    def remove(self, peft_name: str) -> None:
        """Take an adapter out, whole or half loaded; layers without any are the base's own again."""
        self._index()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that it makes another one active; `activate` follows
            for name, layer in self._layers.items():
                layer._active_adapter = []
                layer.delete_adapter(peft_name)
                if not layer.lora_A:
                    self._model.set_submodule(name, layer.base_layer)
        self._index()
        if self.peft is not None:
            self.peft.peft_config.pop(peft_name, None)
            left = list(self.peft.peft_config)[:1]
            self.peft.active_adapter, tuner(self.peft).active_adapter = next(iter(left), ""), left
        if not self._layers:
            self.peft = None
            if hasattr(self._model, "peft_config"):
                del self._model.peft_config

    def activate(self, weights: Mapping[str, float]) -> None:
        """W + sum over `weights` of (PEFT's name, w): w s B A; an empty mapping is the base."""
        if self.peft is None:
            return
        active = list(weights)
        for layer in self._layers.values():
            layer._active_adapter = active
            layer._disable_adapters = not active
            for peft_name in active:
                if peft_name in layer.scaling:
                    layer.set_scale(peft_name, weights[peft_name])
        if active:
            self.peft.active_adapter = active[0]
            tuner(self.peft).active_adapter = active

    def _index(self) -> None:
        self._layers = {name: m for name, m in self._model.named_modules() if isinstance(m, LoraLayer)}


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
