"""GGUF for llama.cpp: the adapter alone, for `--lora`, and what both GGUF formats share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters.factors import mixed_factors
from ..adapters.mix import Mix
from ..bank.bank import AdapterBank
from ..errors import XFactorError
from ..lora.set_head import head_name
from .optional import need

ARCHITECTURES = {
    "gpt2": "GPT2", "llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma3_text": "GEMMA3",
}  # fmt: skip
INTERLEAVED = ("llama", "mistral")
"""Families whose queries and keys llama.cpp keeps with their rotary halves interleaved."""
WAY_ROUND = "export as gguf, which merges it, or as logit-bias"


def write_lora(bank: AdapterBank, mix: Mix, output: Path) -> str:
    """Tensors NAME.lora_a (r, in) and NAME.lora_b (out, r), as llama.cpp's own converter names them.

    llama.cpp scales an update by alpha / r with one alpha for all layers; the adapters' scalings and the mix's weights
    are in lora_b, and alpha is 0, which means no scaling.

    Raises:
        XFactorError: gguf is missing, another architecture, a layer that llama.cpp does not adapt, biases of lora_B, or
            a set head on an output embedding that is tied, which llama.cpp cannot adapt.
    """
    need("gguf", "gguf")
    import gguf

    model = bank.base.model
    names = tensor_names(model)
    infos = [bank.adapters[name] for name in mix.names]
    factors = mixed_factors(infos, [weight for _, weight in mix.parts])
    head = head_name(model)
    if head in factors and model.config.tie_word_embeddings:
        raise XFactorError(f"a set head has no place in a GGUF adapter where the output embedding is tied; {WAY_ROUND}")
    for name, layer in factors.items():
        if name not in names:
            raise XFactorError(f"a GGUF adapter has no place for {name}; export as merged or gguf instead")
        if layer.bias is not None and layer.bias.any():
            raise XFactorError(f"a GGUF adapter has no place for the bias of {name}; {WAY_ROUND}")
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[_architecture(model)])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(str(mix))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    for name, layer in factors.items():
        b = arranged(model, f"{name}.weight", layer.b)
        writer.add_tensor(f"{names[name]}.weight.lora_a", layer.a.numpy())
        writer.add_tensor(f"{names[name]}.weight.lora_b", b.contiguous().numpy())
    finish(writer)
    return f"{output}: LoRA on {len(factors)} layers for llama.cpp, {mix}"


def tensor_names(model: PreTrainedModel) -> dict[str, str]:
    """transformers' module names -> GGUF's tensor names without ".weight".

    Raises:
        XFactorError: an architecture other than those of `ARCHITECTURES`.
    """
    import gguf

    table = gguf.get_tensor_name_map(_architecture(model), model.config.num_hidden_layers)
    names = {name.removesuffix(".base_layer") for name, _ in model.named_modules() if name}
    return {name: found for name in names if (found := table.get_name(name))}


def _architecture(model: PreTrainedModel) -> Any:
    import gguf

    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise XFactorError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}, not {kind}; export as merged and use llama.cpp's own "
            "converter, convert_hf_to_gguf.py or convert_lora_to_gguf.py"
        )
    return gguf.MODEL_ARCH[ARCHITECTURES[kind]]


def arranged(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight or bias (out, ...) in llama.cpp's order: rotary halves of Llama's queries and keys are interleaved."""
    config = model.config
    if config.model_type not in INTERLEAVED or not {"q_proj", "k_proj"} & set(name.split(".")):
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def finish(writer: Any) -> None:
    """Write everything that was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
