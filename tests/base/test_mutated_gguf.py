"""A few of the mutated GGUF files of benchmarks/fuzz_gguf.py, and the kinds of damage that it has found."""

import random

import pytest
import torch

pytest.importorskip("gguf", reason="the extra gguf is not installed")
from fuzz_gguf import EXACT, LOOSE, judged, mutated, sources

from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.errors import XFactorError
from xfactor_peft.lowmem.gguf_file import read_gguf
from xfactor_peft.options import LoadOptions


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("kind", [*EXACT, *LOOSE])
def test_read_whole_or_refused(made, kind, tmp_path):
    ends = set()
    for seed in range(6):
        source = made[seed % 3]
        (tmp_path / "case.gguf").write_bytes(mutated(source, kind, random.Random(seed)))
        ends.add(judged(tmp_path / "case.gguf", kind, source.logits))
    assert ends <= {"refused", "same", "another"}, ends


def changed(source, old, new, tmp_path, count=1):
    """The file with bytes of one length replaced."""
    assert len(old) == len(new)
    assert old in source.data
    (tmp_path / "case.gguf").write_bytes(source.data.replace(old, new, count))
    return tmp_path / "case.gguf"


def test_a_tensor_that_the_header_does_not_name_is_refused(made, tmp_path):
    """Without its last tensor, the output embedding, a model would read as one with tied embeddings."""
    source = made[1]
    data = bytearray(source.data)
    data[8:16] = (int.from_bytes(data[8:16], "little") - 1).to_bytes(8, "little")
    (tmp_path / "case.gguf").write_bytes(data)
    with pytest.raises(XFactorError, match="bytes behind the last tensor belong to none"):
        load_base(resolve_model(str(tmp_path / "case.gguf")), LoadOptions("fp32"))


def test_a_tensor_in_anothers_place_is_refused(made, tmp_path):
    """Two offsets changed for each other: each tensor is inside the file, and of the right size."""
    source = made[1]
    (tmp_path / "case.gguf").write_bytes(source.data)
    tensors = [t for t in read_gguf(tmp_path / "case.gguf").tensors.values() if "ffn_up" in t.name]
    first, second = (
        next(place for place, _ in source.places["offsets"] if source.data[:place].endswith(t.name.encode() + tail(t)))
        for t in tensors[:2]
    )
    data = bytearray(source.data)
    data[first : first + 8], data[second : second + 8] = data[second : second + 8], data[first : first + 8]
    (tmp_path / "case.gguf").write_bytes(data)
    with pytest.raises(XFactorError, match="behind the tensor before it"):
        load_base(resolve_model(str(tmp_path / "case.gguf")), LoadOptions("fp32"))


def tail(tensor):
    """What stands between a tensor's name and its offset."""
    sizes = b"".join(size.to_bytes(8, "little") for size in tensor.shape[::-1])
    kind = {"Q4_1": 3, "Q8_0": 8, "F32": 0}[tensor.form.name]
    return len(tensor.shape).to_bytes(4, "little") + sizes + kind.to_bytes(4, "little")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-5, 0.0])
def test_numbers_that_no_model_has_are_refused(made, value, tmp_path):
    source = made[1]
    key = b"llama.attention.layer_norm_rms_epsilon" + (6).to_bytes(4, "little")
    old = key + torch.tensor([1e-5]).numpy().tobytes()
    if old not in source.data:
        old = key + torch.tensor([1e-6]).numpy().tobytes()
    path = changed(source, old, key + torch.tensor([value]).numpy().tobytes(), tmp_path)
    with pytest.raises(XFactorError, match="not a number above 0"):
        load_base(resolve_model(str(path)), LoadOptions("fp32"))
