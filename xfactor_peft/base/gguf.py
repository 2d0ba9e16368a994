"""A model from a GGUF file: matrices stay packed and mapped; every tensor is used or refused."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..errors import XFactorError
from ..lowmem.gguf_file import GgufFile, PackedTensor
from ..lowmem.gguf_layers import GgufEmbedding, GgufLinear, PackedMatrix
from ..lowmem.streaming import empty_weights
from .fingerprints import SAMPLED_VALUES
from .gguf_config import config_of
from .gguf_tokenizer import ends_of
from .identity import BaseIdentity, digest_of, sketch_of

SKETCHED, SKETCHED_VALUES = 32, 32
"""Matrices, and values of each, by which another quantisation of a model is known again."""
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GPT2_TOP = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head",
}  # fmt: skip
_GPT2_BLOCK = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_GEMMA3_BLOCK = {
    **_BLOCK, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_NAMES = {"gpt2": (_GPT2_TOP, "transformer.h", _GPT2_BLOCK), "gemma3": (_TOP, "model.layers", _GEMMA3_BLOCK)}
"""What is outside of the blocks, where they are, and what is in one; the other families are as `_USUAL`."""
_USUAL = (_TOP, "model.layers", _BLOCK)
_FREQUENCIES = "rope_freqs.weight"
_NAME = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


def load_gguf(file: GgufFile, dtype: torch.dtype) -> PreTrainedModel:
    """The model, frozen and in evaluation mode; `dtype` is that of computations and of everything but the matrices.

    Raises:
        XFactorError: the file's fields or tensors are not those of a whole model of a family in `FAMILIES`.
    """
    config = config_of(file)
    with empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    filled = set()
    for tensor in file.tensors.values():
        if tensor.name != _FREQUENCIES or file.architecture in _NAMES:  # which know no such factors
            filled.add(_place(model, file, tensor, dtype))
    if config.tie_word_embeddings:
        embedding = cast(GgufEmbedding, model.get_input_embeddings())
        model.set_output_embeddings(GgufLinear(embedding.matrix))
    left = [name for name, value in model.named_parameters() if value.is_meta]
    if left:
        raise XFactorError(f"{file.path} does not hold a whole {type(model).__name__}: {left[0]} is missing")
    if _FREQUENCIES in file.tensors:
        _scale_frequencies(model, file.tensors[_FREQUENCIES])
    ends = ends_of(file)
    if ends:
        model.generation_config = GenerationConfig(eos_token_id=ends if len(ends) > 1 else ends[0])
    return model.requires_grad_(False).eval()


def _place(model: PreTrainedModel, file: GgufFile, tensor: PackedTensor, dtype: torch.dtype) -> str:
    """Put a tensor where it belongs; returns the parameter's name."""
    name = module_name(file, tensor.name)
    module_path, _, kind = name.rpartition(".")
    try:
        module = model.get_submodule(module_path)
        expected = getattr(module, kind)
    except AttributeError:
        expected = None
    if expected is None:
        raise XFactorError(f"{file.path}: {tensor.name} has no place in a {type(model).__name__}")
    if isinstance(module, GgufLinear) and kind == "weight":
        raise XFactorError(f"{file.path}: {tensor.name} comes twice")
    conv1d = isinstance(module, Conv1D) and kind == "weight"
    shape = tuple(expected.shape[::-1] if conv1d else expected.shape)
    if tensor.shape != shape:
        raise XFactorError(f"{file.path}: {tensor.name} is {tensor.shape}, not {shape}; the file is damaged")
    if len(shape) == 1 or name == "transformer.wpe.weight":
        value = tensor.unpacked(dtype)
        pairs = _pairs(file, module_path)
        if file.architecture == "gemma3":  # which adds 1 to its norms' weights; the file has the sums
            value = tensor.unpacked(torch.float32).sub_(1).to(dtype)
        if pairs:  # a bias in llama.cpp's order of rows
            value = value.view(pairs, -1, 2).transpose(1, 2).reshape(-1)
        setattr(module, kind, nn.Parameter(value, requires_grad=False))
        return name
    matrix = PackedMatrix(tensor.data, tensor.form, shape[1], dtype, _pairs(file, module_path))
    new: nn.Module
    if isinstance(module, nn.Embedding):
        new = GgufEmbedding(matrix, module.padding_idx, getattr(module, "scalar_embed_scale", None))
    else:
        new = GgufLinear(matrix, from_conv1d=conv1d)
        new.bias = cast(torch.nn.Parameter, module.bias)
    model.set_submodule(module_path, new)
    return name


def module_name(file: GgufFile, name: str) -> str:
    """transformers' name of a tensor: "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight".

    Raises:
        XFactorError: it is no tensor of this family.
    """
    top, blocks, inner = _NAMES.get(file.architecture, _USUAL)
    match = _NAME.fullmatch(name)
    if match:
        block, part, kind = match["block"], match["part"], match["kind"]
        table = inner if block else top
        if part in table:
            return f"{blocks}.{block}.{table[part]}.{kind}" if block else f"{table[part]}.{kind}"
    raise XFactorError(f"{file.path}: the tensor {name!r} is not known of {file.architecture} models")


def _pairs(file: GgufFile, path: str) -> int | None:
    """Heads of a projection whose rows llama.cpp interleaves: queries and keys of its llama family."""
    if file.architecture != "llama" or not path.endswith(("q_proj", "k_proj")):
        return None
    heads = file.fields["llama.attention.head_count"]
    return heads if path.endswith("q_proj") else file.fields.get("llama.attention.head_count_kv", heads)


def _scale_frequencies(model: PreTrainedModel, factors: PackedTensor) -> None:
    """Rotary frequencies divided by the file's factors, as Llama 3.1 and later have them."""
    rotary = model.get_submodule("model.rotary_emb")
    frequencies = cast(torch.Tensor, rotary.inv_freq)
    divisor = factors.unpacked(torch.float32)
    if divisor.shape != frequencies.shape or not (divisor > 0).all():
        raise XFactorError(f"{_FREQUENCIES} does not fit the model's {len(frequencies)} rotary frequencies")
    rotary.inv_freq = frequencies / divisor
    if hasattr(rotary, "original_inv_freq"):
        rotary.original_inv_freq = rotary.inv_freq.clone()


def identify_gguf(
    file: GgufFile, name: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None
) -> BaseIdentity:
    """Fingerprints of the fields and tensors that the forward pass uses; names and descriptions are not among them."""
    config = config_of(file)
    fields = {k: v for k, v in sorted(file.fields.items()) if k.startswith(f"{file.architecture}.")}
    digest = hashlib.sha256()
    for key in sorted(file.tensors):
        tensor = file.tensors[key]
        leading = tensor.data.view(-1)[: SAMPLED_VALUES * tensor.form.size]
        digest.update(json.dumps([key, tensor.form.name, tensor.shape]).encode() + leading.numpy().tobytes())
    return BaseIdentity(
        name=name,
        revision=revision,
        architecture=(config.architectures or [config.model_type])[0],
        shape=f"{config.num_hidden_layers} layers x {config.hidden_size}, vocabulary {config.vocab_size}",
        config=digest_of(fields),
        weights=digest.hexdigest(),
        tokenizer=digest_of(sorted(tokenizer.get_vocab().items())),
        forward=digest.hexdigest(),
        sketch=_sketch(file),
    )


def _sketch(file: GgufFile) -> str:
    """All vectors, and the leading values of `SKETCHED` matrices from all over the model."""
    names = sorted(file.tensors)
    vectors = [file.tensors[name].data for name in names if len(file.tensors[name].shape) == 1]
    matrices = [file.tensors[name] for name in names if len(file.tensors[name].shape) > 1 and "position" not in name]
    chosen = matrices[:: max(1, len(matrices) // SKETCHED)][:SKETCHED]
    width = min(SKETCHED_VALUES, *(tensor.shape[-1] for tensor in chosen))
    first = [replace(tensor, shape=(1, tensor.shape[-1]), data=tensor.data[:1]) for tensor in chosen]
    values = torch.cat([tensor.unpacked(torch.float32)[:, :width] for tensor in first])
    return sketch_of(b"".join(vector.numpy().tobytes() for vector in vectors), values.numpy())
