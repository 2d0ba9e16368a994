"""glibc's allocator: which allocations get pages of their own, and which pages of a mapped file were read."""

from __future__ import annotations

import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from xfactor_peft import MemoryOptions
from xfactor_peft.training.run import TrainingRun

ROOT = Path(__file__).parents[2]
HEAP = """
import contextlib, ctypes, torch
from xfactor_peft.lowmem.allocator import give_back_pages, own_pages, reuse_pages, spare_heap

class Mallinfo(ctypes.Structure):  # glibc's struct mallinfo2; the fifth number are the bytes outside of the heap
    _fields_ = [(str(n), ctypes.c_size_t) for n in range(10)]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

def shared(size=24 * 2**20):
    give_back_pages()
    before = getattr(mallinfo(), "4")
    tensor = torch.empty(size, dtype=torch.uint8)
    return getattr(mallinfo(), "4") - before < size

reuse_pages()
print("run", shared())
with own_pages():
    print("loading", shared())
print("run", shared())
with contextlib.suppress(RuntimeError), spare_heap():
    print("spare", shared(), "small", shared(16 * 2**10))
    with own_pages():
        pass
    print("spare", shared())
    raise RuntimeError
print("run", shared())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have settings of their own")
def test_pieces_share_the_heap_but_while_loading_and_where_memory_is_short():
    """And after an error inside as well; loading does not end a run's setting."""
    assert python(HEAP).split("\n") == [
        "run True", "loading False", "run True", "spare False small True", "spare False", "run True", ""
    ]  # fmt: skip


def python(script, *words):
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


@pytest.mark.parametrize(
    ("packed", "checkpointing", "recomputed", "spare"),
    [(1, "auto", 1, True), (1, "auto", 0, False), (1, "on", 1, False), (0, "auto", 1, False)],
)
def test_a_run_spares_the_heap_for_a_packed_files_promise(packed, checkpointing, recomputed, spare):
    run = SimpleNamespace(
        shape=SimpleNamespace(packed=packed),
        recipe=SimpleNamespace(memory=MemoryOptions(checkpointing)),
        recomputed=recomputed,
    )
    assert isinstance(TrainingRun.heap(run), nullcontext) is not spare


PAGES = """
import sys, psutil, torch
from xfactor_peft.lowmem.gguf_layers import read_pages
mapped = torch.from_file(sys.argv[1], size=2**26, dtype=torch.uint8)
model = torch.nn.Module()
model.weight = torch.nn.Parameter(mapped, requires_grad=False)
before = psutil.Process().memory_info().rss
read_pages(model)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count the pages of files in other ways")
def test_every_page_of_a_mapped_file_is_read(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(2**26))
    assert int(python(PAGES, path)) >= 0.95 * 2**26
