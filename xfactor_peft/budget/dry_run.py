"""A training step on the meta device: shapes without values, so the bytes that it saves are exact and cost nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import repeat_kv

from ..base.claims import check_architecture, check_claims
from ..base.gguf_config import config_of
from ..base.gguf_tokenizer import open_gguf
from ..base.hardware import DTYPES
from ..base.loading import switch_off_dropout
from ..errors import XFactorError, first_line
from ..lora.wrap import add_lora
from ..lowmem.activations import checkpointed_blocks, prepare_for_training
from ..lowmem.checkpoint_files import PIECE_BYTES
from ..lowmem.peft_parts import unwrapped
from ..lowmem.quantized import QuantizedLinear
from ..lowmem.streaming import QUANTIZED, one_at_a_time, replace_linears
from ..options import LoraOptions

QUANTISING = {"int8": 5, "nf4": 17}
"""Bytes a weight, of one layer as it is stored in float32 and on its way to codes."""


@dataclass(frozen=True)
class Shape:
    """What decides a run's memory and time, apart from the model.

    Attributes:
        batch: sequences in a micro-batch.
        length: tokens in a sequence.
        method: "lora" or "full".
        sets: rank of the set head, 0 without one.
        teacher: a step holds the base's states beside the model's (a rate, or `kl_to_base`).
        packed: bytes of a GGUF file's weights, which stay as they are; 0 for other models.
        mapped: weights are page cache, which is not counted: the system may take it back.
    """

    dtype: str
    quantization: str | None
    batch: int
    length: int
    method: str
    lora: LoraOptions
    sets: int = 0
    teacher: bool = False
    packed: int = 0
    mapped: bool = False


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a model and of one training step on it.

    Attributes:
        weights: parameters and buffers of the base, tied ones once; mapped ones are not among them.
        trainable: numbers that train.
        blocks: bytes that each block saves for backward, in order, when it is not recomputed.
        rest: bytes saved outside the blocks.
        block_input: bytes of one block's input, which a recomputed block keeps.
        vocab_size: V.
        width: D.
        largest: bytes that reading the largest layer takes, and quantising it.
        mapped: bytes of weights that are mapped.
    """

    weights: int
    trainable: int
    blocks: tuple[int, ...]
    rest: int
    block_input: int
    vocab_size: int
    width: int
    largest: int = PIECE_BYTES
    mapped: int = 0


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in a model folder or a GGUF file.

    Raises:
        XFactorError: there is none that transformers knows, or it is that of a quantised checkpoint or of a model
            without attention.
    """
    if folder.suffix == ".gguf":
        return config_of(open_gguf(folder))
    check_claims(folder, str(folder))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise XFactorError(f"{folder} holds no configuration that can be planned with: {error}") from error
    check_architecture(config, str(folder))
    return config


def build(config: PretrainedConfig, shape: Shape, device: str) -> PreTrainedModel | PeftModel:
    """The model of `config` as it would train: quantised, wrapped with LoRA, activations made small.

    On the meta device it has no values, elsewhere uninitialised ones for the base.
    """
    stored = torch.float32 if shape.method == "full" else DTYPES[shape.dtype]
    with one_at_a_time(), torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=stored)
    if shape.quantization in QUANTIZED:
        replace_linears(model, shape.quantization)
    model.requires_grad_(False)
    switch_off_dropout(model)
    if device != "meta":
        model.to_empty(device=device)
    model.tie_weights()
    if shape.method == "full":
        model.requires_grad_(True)
    else:
        model = add_lora(model, shape.lora, sets=shape.sets)
    prepare_for_training(model)
    return model.train()


def measure_step(config: PretrainedConfig, shape: Shape) -> StepMemory:
    """Run the trunk of the model on the meta device and count what it saves.

    Raises:
        XFactorError: the model does something that needs real values.
    """
    try:
        model = build(config, shape, "meta")
        base = unwrapped(model)
        saved, block_input = _saved_bytes(base, shape)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise XFactorError(f"{config.model_type} cannot be planned without loading it: {first_line(error)}") from error
    blocks = len(checkpointed_blocks(base))
    tensors = {t.untyped_storage()._cdata: t for n, t in _base_tensors(base)}
    head = base.get_output_embeddings()
    weights = shape.packed or sum(t.numel() * t.element_size() for t in tensors.values())
    return StepMemory(
        weights=0 if shape.mapped else weights,
        mapped=weights if shape.mapped else 0,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        blocks=tuple(saved[i] for i in range(blocks)),
        rest=saved[None],
        block_input=block_input,
        vocab_size=head.weight.shape[0],
        width=head.weight.shape[1],
        largest=PIECE_BYTES if shape.quantization not in QUANTISING else QUANTISING[shape.quantization] * _widest(base),
    )


def _widest(base: PreTrainedModel) -> int:
    """Weights of the largest quantised layer."""
    layers = (m for m in base.modules() if isinstance(m, QuantizedLinear))
    return max((m.in_features * m.out_features for m in layers), default=0)


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "lora_" not in name:
            yield name, tensor


def _saved_bytes(base: PreTrainedModel, shape: Shape) -> tuple[dict[int | None, int], int]:
    """Bytes saved for backward by each block (by number) and outside (None), and the bytes of a block's input."""
    kept = {t.untyped_storage()._cdata for t in (*base.parameters(), *base.buffers())}
    saved: dict[int | None, int] = defaultdict(int)
    place: list[int | None] = [None]
    alive = []  # a freed storage's address could come again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            kept.add(storage._cdata)
            saved[place[0]] += storage.nbytes()
            alive.append(tensor)
        return tensor

    def entering(index: int | None) -> Callable[..., None]:
        return lambda *_: place.__setitem__(0, index)

    hooks = []
    for index, block in enumerate(checkpointed_blocks(base)):
        hooks += [block.register_forward_pre_hook(entering(index)), block.register_forward_hook(entering(None))]
    ids = torch.zeros(shape.batch, shape.length, dtype=torch.long, device="meta")
    full_bf16 = shape.method == "full" and shape.dtype == "bf16"
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=full_bf16),
            _replaced(masking_utils, "find_packed_sequence_indices", lambda positions: None),
            _replaced(functional, "scaled_dot_product_attention", _flash_attention),
        ):
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return saved, hidden.numel() * hidden.element_size()


@contextmanager
def _replaced(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Another function under this name, inside.

    Two cannot run on the meta device: transformers looks for packed sequences in the positions' values, and torch
    chooses an attention kernel that saves more than the one on a CPU.
    """
    before = getattr(module, name, None)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def _flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """The kernel that runs on a CPU; on the meta device torch would choose one that saves T x T probabilities."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
