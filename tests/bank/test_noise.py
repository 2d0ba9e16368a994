"""PEFT's remarks about set heads are not the user's; other warnings are."""

import warnings
from contextlib import nullcontext

import pytest

from xfactor_peft.bank import adapter_layers
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.lowmem.noise import without_notes


@pytest.mark.parametrize("quiet", [True, False])
def test_a_set_head_is_loaded_without_remarks(load_tiny, adapters_root, monkeypatch, quiet):
    if not quiet:
        monkeypatch.setattr(adapter_layers, "without_notes", nullcontext)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        AdapterBank(load_tiny(), adapters_root).load("head")
    assert any("lora_bias" in str(warning.message) for warning in heard) != quiet


def test_other_warnings_are_given():
    with pytest.warns(UserWarning, match="something new"), without_notes():
        warnings.warn("something new", stacklevel=1)
