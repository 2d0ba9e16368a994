"""The 16 values of NF4, and bitsandbytes' compiled NF4 dequantisation, called without importing bitsandbytes.

Its Python package takes 45 MiB of memory once imported; the shared library beside it takes none to speak of and
dequantises about ten times as fast as torch operations can. The entry point is not a public interface, so it is
used only in versions it was tried with and after it has reproduced a known block; `nf4.dequantize_into` has the
same function in torch for every other case.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_TRIED = ("0.49.", "0.50.")
_SYMBOLS = {
    torch.float32: "cdequantize_blockwise_cpu_nf4_fp32",
    torch.bfloat16: "cdequantize_blockwise_cpu_nf4_bf16",
}
# Quantiles of the normal distribution, normalised to [-1, 1], with an exact 0 (appendix E of the paper).
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]


def compiled_kernel(dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """kernel(packed, absmax, out, blocksize) for a CPU tensor `out` with an even number of entries, or None."""
    return _load(dtype) if device.type == "cpu" and dtype in _SYMBOLS else None


@cache
def _load(dtype: torch.dtype) -> Kernel | None:
    try:
        known = version("bitsandbytes").startswith(_TRIED) and platform.system() == "Linux"
        spec = PathFinder.find_spec("bitsandbytes") if known else None
        if spec is None or not spec.submodule_search_locations:
            return None
        library = ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / "libbitsandbytes_cpu.so"))
        function = getattr(library, _SYMBOLS[dtype])
    except (PackageNotFoundError, OSError, AttributeError, ValueError):
        return None
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_longlong] * 3
    function.restype = None

    def kernel(packed: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor, blocksize: int) -> None:
        rows, columns = out.shape
        function(packed.data_ptr(), absmax.data_ptr(), out.data_ptr(), blocksize, rows, columns)

    return kernel if _reproduces(kernel, dtype) else None


def _reproduces(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether every code comes out right in two blocks of different scale."""
    byte = torch.arange(64, dtype=torch.int64) * 4 + torch.arange(64) % 4
    packed, absmax = byte.to(torch.uint8), torch.tensor([1.0, 0.5])
    code = torch.tensor(CODE)
    expected = torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(2, 64) * absmax[:, None]
    out = torch.zeros(2, 64, dtype=dtype)
    kernel(packed, absmax, out, 64)
    return torch.allclose(out.float(), expected, rtol=2**-8, atol=0)
