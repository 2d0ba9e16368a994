"""glibc's allocator, told what suits loading and what suits training. Does nothing with other C libraries.

By default glibc raises the size from which an allocation gets pages of its own each time such an allocation is
freed, up to 32 MiB. Weights and the temporaries of loading then share one heap, which cannot shrink past the last
weight. With a low threshold during loading each weight has its own pages and temporaries go back at once; with a
high one while training, the same pages serve step after step without page faults.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LOW, _HIGH = 64 * 2**10, 32 * 2**20
_KEEP = 256 * 2**20
_shared = [_HIGH]
"""Allocations below this share the heap outside of loading."""


@cache
def _libc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except OSError:
        return None


@contextmanager
def own_pages() -> Iterator[None]:
    """Inside, every allocation of 64 KiB or more has pages of its own; afterwards freed memory is given back."""
    libc = _libc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LOW)
    try:
        yield
    finally:
        reuse_pages()
        give_back_pages()


def give_back_pages() -> None:
    """Return freed pages to the system, so that what comes next does not stand on what came before."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def spare_heap() -> Iterator[None]:
    """Inside, only allocations below 64 KiB share a heap, also after loading.

    Logits, activations and packed weights come in pieces, and what stays of one breaks the hole that the next needs:
    the heap of a step had 200 MiB in use and 180 free, many of them of activations. It costs page faults.
    """
    before, _shared[0] = _shared[0], _LOW
    reuse_pages()
    try:
        yield
    finally:
        _shared[0] = before
        reuse_pages()


def reuse_pages() -> None:
    """From here on, allocations below 32 MiB (or as `spare_heap` has it) share a heap that keeps 256 MiB of freed
    pages."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _shared[0])
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP)
