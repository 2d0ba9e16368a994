"""Load a causal language model tensor by tensor, quantising on the way: no second copy, no fragmented heap."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..errors import first_line
from .allocator import own_pages
from .checkpoint_files import StoredTensor, follows_from_config, same_values, stored_tensors
from .int8 import Int8Linear
from .linears import is_linear
from .nf4 import NF4Linear
from .quantized import QuantizedLinear
from .scratch import release_scratch
from .weight_file import write_weights

QUANTIZED: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": NF4Linear}


class UnsupportedCheckpoint(ValueError):
    """The checkpoint may be fine, but needs transformers' own loader: fall back to `from_pretrained`."""


def load_streaming(folder: Path, *, dtype: torch.dtype, quantization: str | None = None) -> PreTrainedModel:
    """Load `folder` on the CPU, frozen and in evaluation mode; peak memory is the model plus its largest tensor.

    Args:
        dtype: of everything that is not quantised.
        quantization: None, "int8" or "nf4": what every nn.Linear and Conv1D but the output embedding becomes.

    Raises:
        UnsupportedCheckpoint: this loader cannot do this model; transformers' may.
        ValueError: the files are damaged or do not fit the configuration, or `quantization` is unknown.
    """
    with own_pages():
        model, sources = _prepared(Path(folder), dtype, quantization)
        for name, source in sources.items():
            _load_parameter(model, name, source, dtype)
        release_scratch()
    return _finished(model, folder)


def write_mapped(
    file: BinaryIO, folder: Path, about: dict[str, str], *, dtype: torch.dtype, quantization: str | None
) -> None:
    """Write what `load_streaming` makes of `folder` for `load_mapped`; no more than one tensor is in memory at a time.

    Raises:
        As `load_streaming`.
    """
    with own_pages():
        model, sources = _prepared(Path(folder), dtype, quantization)
        names = [name for name in model.state_dict() if name in sources]
        shapes = {key: value for name in names for key, value in _made(model, name, dtype)}

        def values() -> Iterator[tuple[str, torch.Tensor]]:
            for name in names:
                _load_parameter(model, name, sources[name], dtype)
                for key, value in _made(model, name, dtype):
                    yield key, value
                    _assign(model, key, value.to("meta"))

        write_weights(file, shapes, values(), about)
        release_scratch()


def load_mapped(
    folder: Path, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype, quantization: str | None
) -> PreTrainedModel:
    """As `load_streaming`, with the tensors that `write_mapped` wrote in place of `folder`'s.

    Raises:
        As `load_streaming`; ValueError also where `tensors` are not those of this model.
    """
    with own_pages():
        model, sources = _prepared(Path(folder), dtype, quantization)
        for name in sources:
            for key, expected in _made(model, name, dtype):
                found = tensors.get(key)
                if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
                    raise ValueError(f"the mapped weights are not those of {folder}: {key} is missing or does not fit")
                _assign(model, key, found)
    return _finished(model, folder)


def _prepared(
    folder: Path, dtype: torch.dtype, quantization: str | None
) -> tuple[PreTrainedModel, dict[str, StoredTensor]]:
    """The model without weights, quantised layers in place, and which stored tensor fills which of its tensors."""
    if quantization not in (None, *QUANTIZED):
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZED)} or None; got {quantization!r}")
    stored = stored_tensors(folder)
    model = _empty_model(folder, dtype)
    if quantization is not None:
        replace_linears(model, quantization)
    return model, _match(model, stored, folder, dtype)


def _finished(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.tie_weights(recompute_mapping=False)
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    if left:
        raise UnsupportedCheckpoint(f"{folder}: {left[0]} is neither in the files nor tied to anything that is")
    return model.requires_grad_(False).eval()


def _made(model: PreTrainedModel, name: str, dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a stored one becomes, by name: codes and scales of a quantised layer; on meta before it is."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, QuantizedLinear) and leaf == "weight":
        return list(zip((name, f"{path}.{owner.scale_name}"), owner.codes(), strict=True))
    value = getattr(owner, leaf).data
    return [(name, value if leaf in owner._buffers or not value.is_meta else value.to(dtype))]


def _assign(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    """Make `value` the parameter or buffer of this name, without a copy."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))


_BUILDING = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside, no other thread builds a model: functions of torch's are replaced for that. Two at once would leave them
    replaced for good, and a layer that one makes while the other builds would be without values."""
    with _BUILDING:
        yield


@contextmanager
def empty_weights() -> Iterator[None]:
    """Inside, parameters are made on the meta device and not initialised, buffers as usual; one thread at a time."""
    with one_at_a_time(), no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def _empty_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on the meta device and buffers (causal masks, rotary frequencies) as constructed."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedCheckpoint(f"{folder} is quantised already")
    try:
        with empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedCheckpoint(f"{folder}: {first_line(error)}") from error
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        raise UnsupportedCheckpoint(f"{type(model).__name__} keeps parts in float32")
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(folder)
    return model


def _renamings(model: PreTrainedModel) -> list:
    """The changes of names that transformers applies to checkpoints of this kind of model.

    Raises:
        UnsupportedCheckpoint: it also changes values, such as fusing two tensors into one.
    """
    changes = get_model_conversion_mapping(model, add_legacy=False)
    if not all(isinstance(change, WeightRenaming) for change in changes):
        raise UnsupportedCheckpoint(f"tensors of {type(model).__name__} are converted while loading")
    return changes


def quantize_linears(model: PreTrainedModel, quantization: str) -> PreTrainedModel:
    """Quantise a loaded model in place, layer by layer; for checkpoints that `load_streaming` cannot do.

    Every layer nn.Linear or Conv1D but the output embedding; returns the model, frozen.
    """
    for name, old, conv1d in _linears(model):
        weight = old.weight.detach().T if conv1d else old.weight.detach()
        new = QUANTIZED[quantization].from_weight(weight, old.bias, from_conv1d=conv1d)
        model.set_submodule(name, new)
    return model.requires_grad_(False).eval()


def replace_linears(model: PreTrainedModel, quantization: str) -> None:
    """The same layers as `quantize_linears`, on the meta device: the shapes without the values."""
    for name, old, conv1d in _linears(model):
        columns, rows = old.weight.shape if conv1d else old.weight.shape[::-1]
        with torch.device("meta"):
            new = QUANTIZED[quantization](columns, rows, old.bias is not None, from_conv1d=conv1d)
        model.set_submodule(name, new)


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D, bool]]:
    """(name, layer, whether it is a Conv1D) of what is quantised; holds on to no layer that is replaced meanwhile."""
    head = model.get_output_embeddings()
    for name in [name for name, layer in model.named_modules() if layer is not head and is_linear(layer)]:
        layer = cast(nn.Linear | Conv1D, model.get_submodule(name))
        yield name, layer, isinstance(layer, Conv1D)


def _match(
    model: PreTrainedModel, stored: dict[str, StoredTensor], folder: Path, dtype: torch.dtype
) -> dict[str, StoredTensor]:
    """Which stored tensor fills which parameter or persistent buffer; what is tied and stored apart is untied.

    Raises:
        ValueError: tensors are missing, left over or of the wrong shape; names the first of each.
    """
    scales = {f"{n}.{m.scale_name}" for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    wanted = {name for name in model.state_dict() if name not in scales}
    prefix = f"{model.base_model_prefix}."
    renamings = _renamings(model)
    sources, left_over = {}, []
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    for key, tensor in stored.items():
        renamed = key
        for renaming in renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        candidates = (n for k in (key, renamed) for n in (k, prefix + k, k.removeprefix(prefix)))
        name = next((n for n in candidates if n in wanted), None)
        if name is not None:
            sources[name] = tensor
        elif not follows_from_config(key, tensor, ignored):
            left_over.append(key)
    _settle_ties(model, sources, dtype)
    tied = model.all_tied_weights_keys.keys()
    problems = [
        ("missing", sorted(wanted - sources.keys() - tied)),
        ("not part of the model", sorted(left_over)),
        ("of the wrong shape or type", [n for n, t in sources.items() if not _fits(model, n, t)]),
    ]
    found = in_words(problems)
    if found:
        raise ValueError(f"{folder} does not hold a whole {type(model).__name__}: {found}")
    return sources


def _settle_ties(model: PreTrainedModel, sources: dict[str, StoredTensor], dtype: torch.dtype) -> None:
    """Of weights that the configuration ties: one copy is enough, under either name; two that differ stay two.

    As transformers does it: a stored head of other values is what the checkpoint was trained with.
    """
    ties = model.all_tied_weights_keys
    for name, source in list(ties.items()):
        if name in sources and source not in sources:
            sources[source] = sources.pop(name)
        elif name in sources and same_values(sources[name], sources[source], dtype):
            del sources[name]
        elif name in sources:
            del ties[name]
            for config in (model.config, model.config.get_text_config()):  # so that what is saved from it says so
                config.tie_word_embeddings = False


def in_words(problems: Iterable[tuple[str, list[str]]]) -> str:
    """Names of tensors by what is wrong with them, as a sentence with the first of each; "" for none."""
    return "; ".join(f"{len(names)} tensors {what}, such as {names[0]}" for what, names in problems if names)


def _fits(model: PreTrainedModel, name: str, source: StoredTensor) -> bool:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    expected = tuple(getattr(owner, leaf).shape)
    if isinstance(owner, QuantizedLinear) and leaf == "weight":
        expected = (owner.out_features, owner.in_features)
        expected = expected[::-1] if owner.from_conv1d else expected
    return source.dtype is not None and source.shape == expected


def _load_parameter(model: PreTrainedModel, name: str, source: StoredTensor, dtype: torch.dtype) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, QuantizedLinear) and leaf == "weight":
        weight = source.read()
        if weight.dtype == torch.float64:
            weight = weight.float()
        owner.quantize_(weight.T if owner.from_conv1d else weight)
        return
    is_buffer = leaf in owner._buffers
    target = torch.empty(source.shape, dtype=getattr(owner, leaf).dtype if is_buffer else dtype)
    for rows, values in source.pieces():
        (target[rows] if target.dim() else target).copy_(values)
    _assign(model, name, target)
