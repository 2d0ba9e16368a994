"""The 16 values of NF4, and bitsandbytes' compiled NF4 dequantisation, called without importing bitsandbytes.

Its Python package takes 45 MiB of memory once imported; the shared library beside it takes none to speak of and
dequantises about ten times as fast as torch operations can. The entry point is not a public interface, so it is
used only in versions it was tried with and after it has reproduced known blocks; `nf4.dequantize_into` has the
same function in torch for every other case. Rows must be of whole blocks: in version 0.50 one of 48 or 80 entries,
a multiple of 16 but not of 64, comes out with the scales of other blocks.
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
    """kernel(packed, absmax, out, blocksize) for a CPU tensor `out` whose rows are whole blocks, or None."""
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
        assert columns % blocksize == 0, f"rows of {columns} are not whole blocks of {blocksize}"
        function(packed.data_ptr(), absmax.data_ptr(), out.data_ptr(), blocksize, rows, columns)

    return kernel if _reproduces(kernel, dtype) else None


def _reproduces(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Whether every code comes out right in blocks of different scales, in rows of one block and of several."""
    code = torch.tensor(CODE)
    for rows, blocks in ((1, 1), (2, 1), (3, 3), (5, 17)):
        byte = (torch.arange(rows * blocks * 32, dtype=torch.int64) * 37) % 256  # 37 is odd, so every byte comes
        packed, absmax = byte.to(torch.uint8)[:, None], 0.5 + torch.arange(rows * blocks) / 8
        values = torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(-1, 64) * absmax[:, None]
        out = torch.zeros(rows, blocks * 64, dtype=dtype)
        kernel(packed, absmax, out, 64)
        if not torch.allclose(out.float().view(-1, 64), values, rtol=2**-8, atol=0):
            return False
    return True
