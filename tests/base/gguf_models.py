"""Tiny random models of the families that GGUF files are read of, and their files."""

import json

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen3Config

from tests.tiny import VOCABULARY, WEIGHT_STD, tiny_tokenizer

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": WEIGHT_STD, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GEMMA3 = {**COMMON, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 32, "initializer_range": 0.1}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
CONFIGS = {
    "qwen2": Qwen2Config(**{**COMMON, "head_dim": 16}, num_hidden_layers=2),
    "qwen3": Qwen3Config(**COMMON, num_hidden_layers=2, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**GEMMA3),
    "gemma3-linear": Gemma3TextConfig(**GEMMA3, rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL}),
    "gemma3-27b": Gemma3TextConfig(**{**GEMMA3, "num_hidden_layers": 62, "query_pre_attn_scalar": 16}),
}
"""gemma3-27b: as many blocks as tell llama.cpp that attention is scaled by hidden_size / heads."""


def fields_of(config):
    """Of the model, as llama.cpp's converter names them."""
    fields = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }  # fmt: skip
    rope = config.rope_parameters
    if config.model_type != "qwen2":
        fields |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.model_type == "gemma3_text":
        fields["attention.sliding_window"], rope = config.sliding_window, rope["full_attention"]
    if rope["rope_type"] == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    return {**fields, "rope.freq_base": rope["rope_theta"]}


def byte_level(writer):
    """The tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    tokens = [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    merges = tokenizer.backend_tokenizer.model.__getstate__()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def write_gguf(path, model, changed=None, more=(), vocabulary=byte_level):
    """`model` as a GGUF file in float32, with llama.cpp's names and its sums in Gemma's norms."""
    config = model.config
    family = config.model_type.removesuffix("_text")
    import gguf

    writer = gguf.GGUFWriter(path, family)
    kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in {**fields_of(config), **(changed or {})}.items():
        kinds[type(value)](f"{family}.{name}", value)
    vocabulary(writer)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        value = parameter.detach() + (family == "gemma3" and name.endswith("norm.weight"))
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight", ".bias")), value.numpy())
    for name in more:
        writer.add_tensor(name, torch.ones(16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_model(name):
    """Of `CONFIGS`, norms and biases too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model
