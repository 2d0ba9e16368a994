"""Load a base model: dtype, device, quantisation, and a statement of what was quantised."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import XFactorError
from ..lowmem.memory import peaks
from ..lowmem.streaming import QUANTIZED, UnsupportedCheckpoint, load_streaming, quantize_linears
from ..options import LoadOptions
from .identity import BaseIdentity, identify
from .resolve import ModelChoice, resolve_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    backend: str | None = None
    load_peak: dict[str, float] = field(default_factory=dict)

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
        """One line: name, why, dtype, device, and the quantised layers by kind."""
        line = f"model {self.choice.name} ({self.choice.reason}), {self.dtype} on {self.device}"
        if self.quantized:
            layers = ", ".join(f"{count} {kind}" for kind, count in self.quantized.items())
            line += f", quantised by {self.backend}: {layers}"
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
        }


def quantized_types() -> dict[type[torch.nn.Module], str]:
    """Types of quantised layers and what each is: this package's and, once it is imported, bitsandbytes'."""
    types: dict[type[torch.nn.Module], str] = {layer: name for name, layer in QUANTIZED.items()}
    bitsandbytes = sys.modules.get("bitsandbytes")  # without it, no layer is of its types
    if bitsandbytes is not None:
        types |= {bitsandbytes.nn.Linear8bitLt: "int8", bitsandbytes.nn.Linear4bit: "nf4"}
    return types


def quantized_layers(model: torch.nn.Module) -> dict[str, int]:
    """How many layers of each quantised type `model` has, by the type's name, e.g. {"Int8Linear": 96}; {} for none."""
    types = quantized_types()
    return dict(Counter(type(module).__name__ for module in model.modules() if type(module) in types))


def pick_device(device: str = "auto") -> torch.device:
    """Resolve "auto" to CUDA where there is one, else the CPU; raises XFactorError for one that is not there."""
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if several else torch.device("cuda")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise XFactorError(f"`device={device}` is unknown; use auto, cpu or cuda") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise XFactorError(f"`device={device}`: there is no such CUDA device; use `device=cpu`")
    if chosen.type not in ("cpu", "cuda"):
        raise XFactorError(f"`device={device}` is not supported; use auto, cpu or cuda")
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> str:
    """Resolve "auto": bf16 where the hardware multiplies it natively (AMX, AVX512-BF16, recent GPUs), else fp32."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def load_base(choice: ModelChoice, options: LoadOptions = LoadOptions()) -> Base:
    """Load the model and its tokenizer.

    Raises:
        XFactorError: the files are not a causal language model that transformers can load, or the
            device or the quantisation is not available.
    """
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(choice.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise XFactorError(f"{choice.name}: no usable tokenizer in {choice.folder}: {error}") from error
    backend = quantized_by(options, device)
    stored = torch.float32 if options.master_weights else DTYPES[dtype]
    model = _load_model(choice, stored, device, options.quantization, backend)
    model.requires_grad_(False).eval()
    switch_off_dropout(model)
    return Base(
        model=model,
        tokenizer=tokenizer,
        choice=choice,
        identity=identify(choice.folder, choice.name, choice.revision, tokenizer),
        dtype=dtype,
        device=device,
        quantized=quantized_layers(model),
        backend=backend,
        load_peak=peaks(device),
    )


def load(model: str = "auto", options: LoadOptions = LoadOptions(), *, offline: bool = False) -> Base:
    """`resolve_model`, then `load_base`: the one call that most programs need."""
    return load_base(resolve_model(model, offline=offline), options)


def quantized_by(options: LoadOptions, device: torch.device) -> str | None:
    """Who quantises: "native", "bitsandbytes", or None for nobody."""
    if options.quantization is None:
        return None
    if options.backend == "auto":
        return "native" if device.type == "cpu" else "bitsandbytes"
    return options.backend


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
            model = _from_pretrained(choice, dtype, torch.device("cpu"))
            model = quantize_linears(model, quantization)
            return model.to(device)  # type: ignore[arg-type]  # mypy does not bind self in functools.wraps
        return _trainable_4bit(_from_pretrained(choice, dtype, device, _bitsandbytes_config(quantization, dtype)))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise XFactorError(f"{choice.name} cannot be loaded as a causal language model: {reason}") from error


def _from_pretrained(
    choice: ModelChoice,
    dtype: torch.dtype,
    device: torch.device,
    quantization_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        choice.folder,
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantization_config,
        use_safetensors=True,
        trust_remote_code=False,
    )


def _trainable_4bit(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes (0.50) from repacking 4-bit weights on a CPU.

    It does so in the first forward pass in evaluation mode, and what is packed has no backward pass; a run samples
    before it trains.
    """
    switch = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, switch):
            setattr(module, switch, False)
    return model


def _bitsandbytes_config(quantization: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout rate of the base to 0, also those that are plain attributes (attention, OPT's layers).

    The target is a fixed distribution, as in the source experiment; LoRA's own dropout is added later and stays.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)
