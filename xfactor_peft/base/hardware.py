"""What the machine has, and what the options of loading come to there; imports nothing that loads models."""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch

from ..errors import XFactorError, XFactorWarning
from ..options import LoadOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    """Resolve "auto": bf16 where the hardware multiplies it natively (AMX, AVX512-BF16, recent GPUs), else fp32.

    bf16 that was asked for is taken in any case, with a warning where it is emulated.
    """
    if dtype == "auto":
        return "bf16" if multiplies_bf16(device) else "fp32"
    if dtype == "bf16" and not multiplies_bf16(device):
        _name_slow(device.type)
    return dtype


@cache
def _name_slow(kind: str) -> None:
    """Once a process: a plan asks, and then the load."""
    slow = f"this {kind.upper()} only emulates bf16: it takes half the memory of fp32 and many times its time"
    warnings.warn(f"{slow}; `dtype=fp32` is the fast one here", XFactorWarning, stacklevel=4)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself; a CPU that does not is many times slower in it than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def quantized_by(options: LoadOptions, device: torch.device) -> str | None:
    """Who quantises: "native", "bitsandbytes", or None for nobody."""
    if options.quantization is None:
        return None
    if options.backend == "auto":
        return "native" if device.type == "cpu" else "bitsandbytes"
    return options.backend
