"""Mapped weights are those in memory bit for bit, lie in the page cache, and come from a file that is whole."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import psutil
import pytest
import torch
from click.testing import CliRunner

from tests.training.uniform import x_target
from xfactor_peft import LoadOptions, LoraOptions, TrainOptions, XFactorError, train
from xfactor_peft.base import weight_cache
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.cli import main
from xfactor_peft.lowmem.weight_file import ALIGNMENT, read_weights, write_weights

KINDS = [("gpt2", "int8", "fp32"), ("gpt2", "nf4", "bf16"), ("llama", "int8", "bf16"), ("gpt2", None, "bf16")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(weight_cache.PLACE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def the_file(cache) -> Path:
    (path,) = cache.glob("*.safetensors")
    return path


@pytest.mark.parametrize(("family", "quantization", "dtype"), KINDS)
def test_mapped_weights_and_what_is_trained_on_them_are_bit_equal(load_tiny, cache, family, quantization, dtype):
    options = {"quantization": quantization, "dtype": dtype}
    plain, written, mapped = (load_tiny(family, weights=w, **options) for w in ("memory", "mapped", "mapped"))
    expected = plain.model.state_dict()
    for base in (written, mapped):
        found = base.model.state_dict()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
        assert "mapped from disk" in base.describe()
    before = the_file(cache).read_bytes()
    learnt = []
    for base in (plain, mapped):
        assert all(not parameter.requires_grad for parameter in base.model.parameters())
        result = train(base, x_target(base), TrainOptions(steps=2, seq_len=8, batch_size=2), evaluation=None)
        learnt.append({n: p for n, p in result.model.named_parameters() if p.requires_grad})
    assert learnt[0].keys() == learnt[1].keys()
    assert all(torch.equal(value, learnt[1][name]) for name, value in learnt[0].items())
    assert the_file(cache).read_bytes() == before


@pytest.mark.parametrize("quantization", ["int8", None])
def test_nothing_that_is_done_to_a_model_reaches_the_file(load_tiny, cache, quantization):
    base = load_tiny(quantization=quantization, weights="mapped")
    before = the_file(cache).read_bytes()
    result = train(base, x_target(base), TrainOptions(steps=2, seq_len=8), LoraOptions(r=2), evaluation=None)
    merged = result.model.merge_and_unload()
    with torch.no_grad():
        merged.get_output_embeddings().weight.add_(1)
    assert the_file(cache).read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says which pages are files'")
def test_mapped_pages_are_not_this_process_s_own(tmp_path):
    size = 64 * 2**20
    shapes = {"a": torch.empty(size, dtype=torch.int8, device="meta")}
    with (tmp_path / "w").open("wb") as file:
        write_weights(file, shapes, [("a", torch.ones(size, dtype=torch.int8))], {})

    def own() -> int:
        now = psutil.Process().memory_info()
        return now.rss - now.shared

    before = own()
    value = read_weights(tmp_path / "w")["a"]
    assert int(value.view(torch.int64)[::512].sum()) > 0  # every page is touched
    assert own() - before < size // 4
    kept = value.clone()
    assert own() - before > size // 2, "the measure would notice"
    assert kept[0] == 1


def test_tensors_of_any_size_begin_aligned(tmp_path):
    values = {f"t{n}": torch.arange(n, dtype=torch.uint8) for n in (1, 64, 63, 0, 130)}
    shapes = {name: value.to("meta") for name, value in values.items()}
    with (tmp_path / "w").open("wb") as file:
        write_weights(file, shapes, values.items(), {"model": "m"})
    found = read_weights(tmp_path / "w")
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert all(value.data_ptr() % ALIGNMENT == 0 for value in found.values() if len(value))


@pytest.mark.parametrize("place", [0.3, 0.99])
def test_a_damaged_file_is_written_anew(load_tiny, cache, place):
    expected = load_tiny(quantization="int8").model.state_dict()
    load_tiny(quantization="int8", weights="mapped")
    path = the_file(cache)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    for damaged in (content, content[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            read_weights(path)
        found = load_tiny(quantization="int8", weights="mapped").model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_every_kind_and_every_change_of_the_model_has_a_file_of_its_own(load_tiny, tiny_folders, cache, tmp_path):
    for options in ({"quantization": "int8"}, {"quantization": "nf4"}, {"dtype": "bf16"}):
        load_tiny(weights="mapped", **options)
    assert len(list(cache.glob("*.safetensors"))) == 3
    folder = copytree(tiny_folders["gpt2"], tmp_path / "model")

    def last_row() -> torch.Tensor:
        base = load_base(resolve_model(str(folder)), LoadOptions("fp32", quantization="int8", weights="mapped"))
        return base.model.get_input_embeddings().weight[-1].clone()

    before = last_row()
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    entry = content.index(b"data_offsets", content.index(b"transformer.wte.weight"))
    offsets = content[content.index(b"[", entry) + 1 : content.index(b"]", entry)]
    stop = int(bytes(offsets).split(b",")[1]) + 8 + int.from_bytes(content[:8], "little")
    content[stop - 2] ^= 1  # of a value that the fingerprint does not look at
    file.write_bytes(content)
    assert not torch.equal(last_row(), before)


def test_two_that_begin_together_write_one_file(load_tiny, cache, monkeypatch):
    written, write = [], weight_cache.write_atomically
    monkeypatch.setattr(weight_cache, "write_atomically", lambda *a: (written.append(a[0]), write(*a)))
    threads = [
        threading.Thread(target=load_tiny, kwargs={"quantization": "int8", "weights": "mapped"}) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu", "a load left torch as it was while it built a model"
    assert written == [the_file(cache)]
    assert not list(cache.glob("*.writing"))


def test_what_was_not_used_for_longest_makes_room(load_tiny, cache, monkeypatch):
    for quantization in ("int8", "nf4"):
        load_tiny(quantization=quantization, weights="mapped")
    for one in weight_cache.cached():
        os.utime(one.path, (1, 1) if one.about["quantization"] == "int8" else (2, 2))
    load_tiny(quantization="int8", weights="mapped")  # uses it again
    assert [one.about["quantization"] for one in weight_cache.cached()] == ["int8", "nf4"]
    monkeypatch.setattr(weight_cache, "LIMIT", sum(one.size for one in weight_cache.cached()) + 10)
    load_tiny(dtype="bf16", weights="mapped")
    left = [one.about["quantization"] for one in weight_cache.cached()]
    assert "none" in left
    assert "nf4" not in left


def test_what_a_killed_process_left_is_removed(load_tiny, cache):
    """By the next that writes, and by who clears, even where there is no whole file."""
    cache.mkdir()
    leftover = cache / ".0123.safetensors.writing"
    leftover.write_bytes(b"half")
    load_tiny(weights="mapped")
    assert not leftover.exists()
    weight_cache.clear(weight_cache.cached())
    leftover.write_bytes(b"half")
    CliRunner().invoke(main, ["cache", "--clear"], catch_exceptions=False)
    assert [path.name for path in cache.iterdir()] in ([], [".lock"])


def test_a_file_that_vanishes_is_not_listed(cache):
    cache.mkdir()
    (cache / "0123.safetensors").symlink_to(cache / "nowhere")
    assert weight_cache.cached() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "mapped", "master_weights": True}, "`method=full` trains the weights"),
        ({"weights": "mapped", "quantization": "int8", "backend": "bitsandbytes"}, "`backend=bitsandbytes`"),
        ({"weights": "disk"}, "`weights` must be one of"),
    ],
)
def test_what_cannot_be_mapped_is_refused(load_tiny, cache, options, words):
    with pytest.raises(XFactorError, match=words):
        load_tiny(**options)
    assert not cache.exists()


def test_a_checkpoint_that_transformers_must_load_is_refused(load_tiny, cache, monkeypatch):
    monkeypatch.setattr("xfactor_peft.lowmem.streaming.get_model_conversion_mapping", lambda *_, **__: [object()])
    with pytest.raises(XFactorError, match="`weights=memory`"):
        load_tiny(weights="mapped")
    assert not list(cache.glob("*safetensors*"))


def test_a_full_disk_leaves_nothing(load_tiny, cache, monkeypatch):
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(XFactorError, match=r"name another folder in \$XFACTOR_CACHE"):
        load_tiny(weights="mapped")
    assert not list(cache.glob("*safetensors*"))


def test_the_command_lists_and_clears(load_tiny, cache):
    load_tiny(quantization="int8", weights="mapped")
    load_tiny("llama", quantization="nf4", weights="mapped")
    listed = CliRunner().invoke(main, ["cache"])
    assert "int8, fp32" in listed.output
    assert "2 files" in listed.output
    name = next(one.about["model"] for one in weight_cache.cached() if one.about["quantization"] == "nf4")
    done = CliRunner().invoke(main, ["cache", "--clear", "--model", name])
    assert "1 file," in done.output
    assert [one.about["quantization"] for one in weight_cache.cached()] == ["int8"]
    assert CliRunner().invoke(main, ["cache", "--clear"]).exit_code == 0
    assert not weight_cache.cached()
