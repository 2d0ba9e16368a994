"""GGUF for llama.cpp: the merged model with its tokenizer, in float32."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..adapters.mix import Mix
from ..bank.bank import AdapterBank
from ..bank.merging import merge
from ..errors import XFactorError
from ..tokens.ends import special_ids
from .gguf_lora import arranged, finish, tensor_names
from .optional import need


def write_model(bank: AdapterBank, mix: Mix, output: Path) -> str:
    """Weights as float32 (llama.cpp's `llama-quantize` makes them smaller), hyperparameters and vocabulary.

    Raises:
        XFactorError: gguf is missing, another architecture, or a tokenizer that is not GPT-2's kind of byte-level BPE.
    """
    need("gguf", "gguf")
    import gguf

    names = tensor_names(bank.base.model)
    _check_tokenizer(bank.base.tokenizer)
    notes: list[str] = []
    model = merge(bank, mix, tell=notes.append)
    writer = gguf.GGUFWriter(output, model.config.model_type)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{bank.base.choice.name} with {mix}")
    _add_parameters(writer, model)
    _add_vocabulary(writer, model, bank.base.tokenizer)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    count = 0
    for name, tensor in model.named_parameters():  # a tied embedding comes once, as the input one
        module, _, kind = name.rpartition(".")
        if module in names:
            value = arranged(model, name, tensor.detach().float().T if name in transposed else tensor.detach().float())
            writer.add_tensor(f"{names[module]}.{kind}", value.contiguous().cpu().numpy())
            count += 1
    finish(writer)
    return "; ".join([f"{output}: {count} tensors in float32 for llama.cpp, merged {mix}", *notes])


def _add_parameters(writer: Any, model: PreTrainedModel) -> None:
    import gguf

    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise XFactorError(f"GGUF export knows plain rotary positions, not {rope['rope_type']}")
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim or config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """GPT-2's byte-level BPE with its own splitting is the kind whose name in GGUF ("gpt-2") is certain."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {}
    splitting = spec.get("pre_tokenizer") or {}
    if spec.get("model", {}).get("type") != "BPE" or splitting.get("type") != "ByteLevel":
        raise XFactorError(
            "GGUF export knows byte-level BPE tokenizers of GPT-2's kind; for others export as merged and use "
            "llama.cpp's convert_hf_to_gguf.py"
        )


def _add_vocabulary(writer: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    import gguf

    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    special, size = special_ids(tokenizer), model.get_output_embeddings().weight.shape[0]
    kinds = [
        gguf.TokenType.UNUSED if i not in texts else gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
        for i in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(kinds)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)
