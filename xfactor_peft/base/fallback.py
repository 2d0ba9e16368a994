"""transformers' own loader, for what the streaming one cannot do: no less strict about the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ..lowmem.checkpoint_files import follows_from_config, stored_tensors
from ..lowmem.streaming import in_words
from .quantised import quantized_types


def from_pretrained(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """transformers' own loader, as strict about the files as `load_streaming`.

    Raises:
        ValueError: tensors are missing (transformers would make random ones), left over or of the wrong shape or type.
    """
    stored = stored_tensors(folder)  # also says what is damaged
    # Given as None, it would erase what the checkpoint says of itself.
    quantisation: dict[str, Any] = {} if quantization_config is None else {"quantization_config": quantization_config}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **quantisation,
        )
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise ValueError("tensors that make one of the model's, such as experts, are missing or do not fit") from error
    model, info = loaded
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unread = {key for key, tensor in stored.items() if follows_from_config(key, tensor, ignored)}
    codes = [name for name, tensor in stored.items() if tensor.dtype is None]
    problems = [
        ("missing", info["missing_keys"]),
        ("not part of the model", info["unexpected_keys"]),
        ("of the wrong shape", {key for key, *_ in info["mismatched_keys"]} | _misshapen_codes(model)),
        ("of a type that is not floating point", codes),
    ]
    found = in_words(
        (what, sorted(name for name in names if what == "missing" or name not in unread)) for what, names in problems
    )
    if found or info["error_msgs"]:
        raise ValueError(found or info["error_msgs"][0])
    return model


def _misshapen_codes(model: PreTrainedModel) -> set[str]:
    """Layers of bitsandbytes whose weight has not their shape: transformers looks at that of plain layers alone."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and type(module) in quantized_types():
            state = getattr(module.weight, "quant_state", None)  # that of 4 bits; its codes are flat
            shape = tuple(module.weight.shape if state is None else state.shape)
            if shape != (module.out_features, module.in_features):
                found.add(f"{name}.weight")
    return found


def trainable_4bit(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes (0.50) from repacking 4-bit weights on a CPU.

    It does so in the first forward pass in evaluation mode, and what is packed has no backward pass; a run samples
    before it trains.
    """
    switch = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, switch):
            setattr(module, switch, False)
    return model


def bitsandbytes_config(quantization: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None
