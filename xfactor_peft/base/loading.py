"""Load a base model: dtype, device, quantisation, and a statement of what was quantised."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import XFactorError, first_line
from ..lowmem.attention import use_short_attention
from ..lowmem.gguf_layers import GgufLinear
from ..lowmem.linears import listed
from ..lowmem.memory import peaks
from ..lowmem.noise import quiet_bitsandbytes
from ..lowmem.scratch import release_scratch
from ..lowmem.streaming import (
    UnsupportedCheckpoint,
    load_mapped,
    load_streaming,
    one_at_a_time,
    quantize_linears,
    write_mapped,
)
from ..options import LoadOptions
from .claims import check_vocabulary
from .fallback import bitsandbytes_config, from_pretrained, trainable_4bit
from .fingerprints import identify
from .gguf import identify_gguf, load_gguf
from .gguf_tokenizer import open_gguf, tokenizer_of
from .hardware import DTYPES, pick_device, pick_dtype, quantized_by
from .identity import BaseIdentity
from .quantised import quantized_layers, quantized_types, unquantized_share, unquantized_weights
from .resolve import ModelChoice, resolve_model
from .vocabulary import Vocabulary, read_vocabulary, reason
from .weight_cache import mapped_weights

quiet_bitsandbytes()

BATCH_NATS = 0.01
"""KL that the rest of a batch moves a next-token distribution by under int8: outlier columns are found over all rows.
Measured on SmolLM2-135M: 0.004 to 0.026 from float32 for the same row among 1 to 64."""


@dataclass
class Base:
    """A loaded base model with everything that is known about it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    choice: ModelChoice
    identity: BaseIdentity
    dtype: str
    device: torch.device
    quantized: dict[str, int] = field(default_factory=dict)
    unquantized: dict[str, int] = field(default_factory=dict)
    backend: str | None = None
    load_peak: dict[str, float] = field(default_factory=dict)
    mapped: bool = False  # from a file of `weight_cache`; a GGUF file always is, and is not meant

    @property
    def vocab_size(self) -> int:
        """V, the rows of the output embedding (at least as many as the tokenizer has tokens)."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def quantization(self) -> str | None:
        """ "int8", "nf4" or None, whoever quantised."""
        kinds = quantized_types()
        return next((kinds[type(module)] for module in self.model.modules() if type(module) in kinds), None)

    def describe(self) -> str:
        """One line: name, why, dtype, device, the quantised layers by kind, and what was not."""
        line = f"model {self.choice.name} ({self.choice.reason}), {self.dtype} on {self.device}"
        if self.quantized:
            layers = ", ".join(f"{count} {kind}" for kind, count in self.quantized.items())
            line += f", {'packed in the file' if self.backend == 'gguf' else f'quantised by {self.backend}'}: {layers}"
            if self.backend == "native" and self.quantization == "int8":
                line += f" (rounding varies with the batch by about {BATCH_NATS:g} nats)"
        if self.mapped:
            line += ", mapped from disk"
        if self.unquantized:
            share = unquantized_share(self.model)
            line += f"; not quantised: {listed(self.unquantized)}, {share:.0%} of the blocks' weights"
        return line

    def record(self) -> dict[str, Any]:
        """What is stored with every result made from this model."""
        return {
            **self.identity.record(),
            "why": self.choice.reason,
            "dtype": self.dtype,
            "device": str(self.device),
            "quantized_by": self.backend,
            "quantized_layers": self.quantized,
            "unquantized_weights": self.unquantized,
        }


@one_at_a_time()
def load_base(choice: ModelChoice, options: LoadOptions = LoadOptions(), vocabulary: Vocabulary | None = None) -> Base:
    """Load the model and its tokenizer, unless `vocabulary` holds that already.

    Raises:
        XFactorError: the files are not a causal language model that transformers can load, or the
            device or the quantisation is not available; or the checkpoint is quantised already; or its weights cannot
            be mapped.
    """
    if choice.gguf is not None:
        return _load_gguf(choice, choice.gguf, options, vocabulary)
    tokenizer = (vocabulary or read_vocabulary(choice)).tokenizer
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    backend = quantized_by(options, device)
    if options.weights == "mapped":
        check_mapped(options, device, choice.name)
        model = _map_model(choice, dtype, options.quantization)
    else:
        stored = torch.float32 if options.master_weights else DTYPES[dtype]
        model = _load_model(choice, stored, device, options.quantization, backend)
    check_vocabulary(tokenizer, model, choice.name)
    model.requires_grad_(False).eval()
    switch_off_dropout(model)
    if device.type == "cpu":
        use_short_attention(model)
    quantized = quantized_layers(model)
    if backend and not quantized:
        raise XFactorError(
            f"`quantization={options.quantization}`: {backend} finds no layer to quantise in {type(model).__name__}; "
            + ("load it without" if backend == "native" else "use `backend=native`")
        )
    load_peak = peaks(device)
    if backend == "native":
        _check_calls(model)
    return Base(
        model=model,
        tokenizer=tokenizer,
        choice=choice,
        identity=identify(choice.folder, choice.name, choice.revision, tokenizer),
        dtype=dtype,
        device=device,
        quantized=quantized,
        unquantized=unquantized_weights(model) if backend else {},
        backend=backend,
        load_peak=load_peak,
        mapped=options.weights == "mapped",
    )


def check_mapped(options: LoadOptions, device: torch.device, name: str) -> None:
    """Raises XFactorError for options under which the weights of a model cannot be mapped."""
    if options.master_weights:
        raise XFactorError(f"`method=full` trains the weights of {name}, which `weights=mapped` keeps frozen on disk")
    if device.type != "cpu":
        raise XFactorError("`weights=mapped` is for a CPU; give `device=cpu`")
    if quantized_by(options, device) == "bitsandbytes":
        raise XFactorError("`backend=bitsandbytes` makes weights of its own, which cannot be mapped; drop it")


def _load_gguf(choice: ModelChoice, path: Path, options: LoadOptions, vocabulary: Vocabulary | None) -> Base:
    """A base whose matrices stay as they are in a GGUF file."""
    check_gguf_options(options, choice.name)
    device = pick_device(options.device)
    if device.type != "cpu":
        raise XFactorError(f"{choice.name}: packed weights are multiplied on a CPU; give `device=cpu`")
    dtype = pick_dtype(options.dtype, device)
    file = open_gguf(path)
    tokenizer = vocabulary.tokenizer if vocabulary else tokenizer_of(file)
    model = load_gguf(file, DTYPES[dtype])
    model.config.name_or_path = choice.name
    check_vocabulary(tokenizer, model, choice.name)
    switch_off_dropout(model)
    use_short_attention(model)
    return Base(
        model, tokenizer, choice, identify_gguf(file, choice.name, tokenizer, choice.revision), dtype, device,
        dict(Counter(layer.matrix.form.name for layer in model.modules() if isinstance(layer, GgufLinear))),
        backend="gguf", load_peak=peaks(device),
    )  # fmt: skip


def check_gguf_options(options: LoadOptions, name: str) -> None:
    """Raises XFactorError for options that a GGUF file, whose weights are quantised already and frozen, cannot have."""
    if options.quantization is not None:
        raise XFactorError(
            f"{name} is quantised already, and stays as it is; drop `quantization={options.quantization}`"
        )
    if options.weights == "memory":
        raise XFactorError(f"the weights of {name} stay mapped; drop `weights=memory`")
    if options.master_weights:
        raise XFactorError(f"`method=full` cannot train {name}, whose weights stay packed; use `method=lora`")


def _check_calls(model: PreTrainedModel) -> None:
    """Two tokens through a model whose layers were replaced: some read a layer's weight instead of calling it.

    Raises:
        XFactorError: that fails, as for Jamba's mixers.
    """
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise XFactorError(
            f"{type(model).__name__} does not run with quantised layers, whose weights are codes "
            f"({first_line(error)}); load it without `quantization`"
        ) from error
    release_scratch()


def load(model: str = "auto", options: LoadOptions = LoadOptions(), *, offline: bool = False) -> Base:
    """`resolve_model`, then `load_base`: the one call that most programs need."""
    return load_base(resolve_model(model, offline=offline), options)


def _load_model(
    choice: ModelChoice, dtype: torch.dtype, device: torch.device, quantization: str | None, backend: str | None
) -> PreTrainedModel:
    """Tensor by tensor on a CPU, through transformers' own loader on CUDA, for bitsandbytes, and where it must be."""
    try:
        if device.type == "cpu" and backend != "bitsandbytes":
            try:
                return load_streaming(choice.folder, dtype=dtype, quantization=quantization)
            except UnsupportedCheckpoint:
                pass
        if backend == "native" and quantization is not None:
            model = from_pretrained(choice.folder, dtype, torch.device("cpu"))
            model = quantize_linears(model, quantization)
            return model.to(device)  # type: ignore[arg-type]  # mypy does not bind self in functools.wraps
        return trainable_4bit(from_pretrained(choice.folder, dtype, device, bitsandbytes_config(quantization, dtype)))
    except MemoryError:
        raise
    except Exception as error:  # whatever a library makes of files that are not ours
        raise XFactorError(f"{choice.name} cannot be loaded as a causal language model: {reason(error)}") from error


def _map_model(choice: ModelChoice, dtype: str, quantization: str | None) -> PreTrainedModel:
    """The model with weights that lie in a file of their own (see `weight_cache`), which is written the first time."""
    how: dict[str, Any] = {"dtype": DTYPES[dtype], "quantization": quantization}

    def write(file: BinaryIO, about: dict[str, str]) -> None:
        write_mapped(file, choice.folder, about, **how)

    try:
        kind = {"dtype": dtype, "quantization": quantization or "none"}
        return load_mapped(choice.folder, mapped_weights(choice.folder, choice.name, kind, write), **how)
    except UnsupportedCheckpoint as error:
        raise XFactorError(
            f"{choice.name} needs transformers' own loader, so its weights cannot be mapped ({first_line(error)}); "
            "give `weights=memory`"
        ) from error
    except (MemoryError, XFactorError):
        raise
    except Exception as error:  # whatever a library makes of files that are not ours
        raise XFactorError(f"{choice.name} cannot be loaded as a causal language model: {reason(error)}") from error


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout rate of the base to 0, also those that are plain attributes (attention, OPT's layers).

    The target is a fixed distribution, as in the source experiment; LoRA's own dropout is added later and stays.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)
