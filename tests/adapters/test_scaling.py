"""The scaling of a layer, as PEFT gives it to the same configuration."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from xfactor_peft.adapters.config import layer_scaling

PATTERNS = [{}, {"one": 3}, {"on": 3}, {"inner.one": 5, "one": 7}, {"one": 7, "inner.one": 5}, {r".*\.o\w+": 2}]


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.filterwarnings("ignore:The following alpha_pattern")
@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_what_peft_makes_of_the_configuration(patterns, rslora):
    model = nn.ModuleDict({"inner": nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["one", "two"], alpha_pattern=patterns, use_rslora=rslora)
    wrapped = get_peft_model(model, config)
    scalings = set()
    for name in ("inner.one", "inner.two"):
        layer = wrapped.base_model.model.get_submodule(name)
        assert layer_scaling(config.to_dict(), name, 4) == pytest.approx(layer.scaling["default"])
        scalings.add(layer.scaling["default"])
    assert (len(scalings) == 2) == bool(patterns and patterns != {"on": 3})
