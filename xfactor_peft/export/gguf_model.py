"""GGUF for llama.cpp: the merged model with its tokenizer, in float32."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..adapters.mix import Mix
from ..bank.bank import AdapterBank
from ..bank.merging import merge
from ..errors import XFactorError
from ..tokens.ends import special_ids
from .gguf_claims import WAY_ROUND, added_around, check_config, ends, splitting
from .gguf_lora import arranged, finish, tensor_names
from .gguf_merge import merge_into_file
from .optional import need

_MASK = re.compile(r"\.attn\.(masked_)?bias$")


def write_model(bank: AdapterBank, mix: Mix, output: Path, tensors: str = "f16") -> str:
    """Weights as float32 (llama.cpp's `llama-quantize` makes them smaller), hyperparameters and vocabulary.

    A base that is a GGUF file already is merged into its own tensors: `gguf_merge.merge_into_file`.

    Raises:
        XFactorError: gguf is missing, another architecture, or a tensor, a field of the configuration or a part of the
            tokenizer that a GGUF file of this family cannot hold.
    """
    need("gguf", "gguf")
    import gguf

    base = bank.base
    if base.choice.gguf is not None:
        return merge_into_file(bank, mix, output, tensors)
    names = tensor_names(base.model)
    check_config(base.model.config)
    splits, around, stops = splitting(base.tokenizer), added_around(base.tokenizer), ends(base.tokenizer, base.model)
    notes: list[str] = []
    model = merge(bank, mix, tell=notes.append)
    found = _tensors(model, names)
    writer = gguf.GGUFWriter(output, model.config.model_type)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{base.choice.name} with {mix}")
    _add_parameters(writer, model)
    _add_vocabulary(writer, model, base.tokenizer, splits)
    writer.add_add_bos_token(around[0])
    writer.add_add_eos_token(around[1])
    for stop, add in zip(stops, (writer.add_eos_token_id, writer.add_eot_token_id), strict=False):
        add(stop)
    for name, value in found.items():
        writer.add_tensor(name, value.contiguous().cpu().numpy())
    finish(writer)
    return "; ".join([f"{output}: {len(found)} tensors in float32 for llama.cpp, merged {mix}", *notes])


def _tensors(model: PreTrainedModel, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Every tensor of the model by its name in GGUF; a tied embedding comes once, as the input one.

    Raises:
        XFactorError: one has no place in a file of this family.
    """
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    kept = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in model.state_dict())]
    found = {}
    for name, tensor in kept:
        module, _, kind = name.rpartition(".")
        if module in names and kind in ("weight", "bias"):
            value = tensor.detach().float()
            found[f"{names[module]}.{kind}"] = arranged(model, name, value.T if name in transposed else value)
        elif not _MASK.search(f".{name}"):
            raise XFactorError(f"a GGUF file of a {model.config.model_type} model has no place for {name}; {WAY_ROUND}")
    return found


def _add_parameters(writer: Any, model: PreTrainedModel) -> None:
    import gguf

    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(width)


def _add_vocabulary(writer: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, splits: str) -> None:
    import gguf

    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    special, size = special_ids(tokenizer, model), model.get_output_embeddings().weight.shape[0]
    added = tokenizer.added_tokens_decoder.keys()

    def kind(i: int) -> Any:
        if i not in texts:
            return gguf.TokenType.UNUSED
        if i in special:
            return gguf.TokenType.CONTROL
        return gguf.TokenType.USER_DEFINED if i in added else gguf.TokenType.NORMAL

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kind(i) for i in range(size)])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special_tokens = gguf.SpecialVocab(folder, load_merges=True)
    special_tokens.add_special_token.clear()  # what is put around a text, and what ends it, is seen and not read
    special_tokens.special_token_ids.pop("eos", None)
    special_tokens.add_to_gguf(writer, quiet=True)
