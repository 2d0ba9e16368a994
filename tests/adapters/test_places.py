"""Where adapters are, under which names, and what is left behind when one cannot be written."""

import errno
import shutil
from pathlib import Path

import click
import pytest
from safetensors import SafetensorError

from xfactor_peft import export as exporting
from xfactor_peft.adapters import combine as combining
from xfactor_peft.adapters.adapter import find_adapter, list_adapters
from xfactor_peft.adapters.catalogue import rename_adapter
from xfactor_peft.adapters.combine import combine
from xfactor_peft.adapters.files import CONFIG, WEIGHTS
from xfactor_peft.adapters.mix import Mix, parse_mix
from xfactor_peft.adapters.output import staged, staged_file
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base import resolve
from xfactor_peft.cli import main
from xfactor_peft.cli.values import ADAPTER
from xfactor_peft.errors import OutOfRoom, XFactorError


def linked(adapters_root, repository, below):
    """An adapter in a folder of a snapshot in the Hub's cache: links to blobs."""
    blobs, snapshot = repository / "blobs", repository / "snapshots/1234" / below
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        shutil.copy(adapters_root / "x" / name, blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    return snapshot


@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
def test_a_folder_inside_a_snapshot_of_the_hub_s_cache(tiny, adapters_root, tmp_path, below):
    snapshot = linked(adapters_root, tmp_path / "models--a--b", below)
    assert AdapterBank(tiny, adapters_root).load(str(snapshot)).shapes


def test_a_link_out_of_the_repository_stays_refused(tiny, adapters_root, tmp_path):
    snapshot = linked(adapters_root, tmp_path / "models--a--b", "sub")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(adapters_root / "x" / WEIGHTS)
    with pytest.raises(XFactorError, match=r"leads out of its folder"):
        AdapterBank(tiny, adapters_root).load(str(snapshot))
    elsewhere = linked(adapters_root, tmp_path / "no-cache", "sub")
    with pytest.raises(XFactorError, match=r"leads out of its folder"):
        AdapterBank(tiny, adapters_root).load(str(elsewhere))


def test_names_that_look_like_mixes(tmp_path, monkeypatch):
    known = ["a+b", "a", "b", "c:1", "a+b:0.5+c"]
    for text, parts in {
        "a+b": [("a+b", 1.0)],
        "a+b:0.5": [("a+b", 0.5)],
        "a+b:0.25+c:1": [("a+b", 0.25), ("c:1", 1.0)],
        "a+b:0.5+c": [("a+b:0.5+c", 1.0)],
        "a+b:0.5+c:2": [("a+b:0.5+c", 2.0)],
        "c:1:0.25+a:2": [("c:1", 0.25), ("a", 2.0)],
        "b+a": [("b", 1.0), ("a", 1.0)],
        "b + a:0.5": [("b", 1.0), ("a", 0.5)],
        "new:0.3+other": [("new", 0.3), ("other", 1.0)],
    }.items():
        assert parse_mix(text, known) == Mix(tuple(parts)), text
    assert parse_mix("a+b:0.5") == Mix((("a", 1.0), ("b", 0.5)))  # where no folder is called so
    monkeypatch.chdir(tmp_path)
    Path("a+b").mkdir()
    assert parse_mix("a+b:0.5") == Mix((("a+b", 0.5),))
    for bad in ("a+", "+a", "a+:1"):
        with pytest.raises(XFactorError, match=r"has no adapter|is not a weight"):
            parse_mix(bad, known)


def test_a_folder_of_adapters_is_not_one_and_says_what_is_there(adapters_root, tmp_path):
    with pytest.raises(
        XFactorError, match=rf"so it is no adapter; the adapters in it are {adapters_root}/head, {adapters_root}/x"
    ):
        find_adapter(str(adapters_root), tmp_path)
    (tmp_path / "notes").mkdir()
    with pytest.raises(XFactorError, match="it holds nothing"):
        find_adapter("notes", tmp_path)
    (tmp_path / "notes/a.txt").touch()
    with pytest.raises(XFactorError, match=r"it holds a\.txt"):
        find_adapter("notes", tmp_path)
    with pytest.raises(XFactorError, match=r"no such adapter in .* and no such folder"):
        find_adapter("nowhere", tmp_path)


def test_hidden_folders_are_no_adapters(adapters_root, tmp_path):
    for name in (".x.partial", ".x.old", "x.partial"):
        shutil.copytree(adapters_root / "x", tmp_path / name)
    assert list_adapters(tmp_path) == ["x.partial"]
    context = click.Context(main)
    context.params["adapters_dir"] = tmp_path
    assert [item.value for item in ADAPTER.shell_complete(context, None, "")] == ["x.partial"]


FULL = [OSError(errno.ENOSPC, "disk full"), OSError("disk full"), SafetensorError("I/O error: disk full")]


@pytest.mark.parametrize("error", [*FULL, KeyboardInterrupt()])
def test_what_fails_leaves_nothing_beside(adapters_root, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(combining, "save_file", fail)
    told = OutOfRoom if error in FULL else KeyboardInterrupt
    with pytest.raises(told, match=r"new cannot be written \(.*disk full\); nothing was" if error in FULL else None):
        combine(Mix((("x", 0.5), ("z", 0.5))), tmp_path / "new", adapters_root)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_nothing_and_replaces_nothing(tiny, adapters_root, tmp_path, monkeypatch):
    bank = AdapterBank(tiny, adapters_root)
    bank.load("x")

    def half(bank, mix, output):
        output.write_text("half")
        raise XFactorError("it broke")

    monkeypatch.setitem(exporting.FILES, "logit-bias", (".json", half))
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json", "deeper/new.json"):
        with pytest.raises(XFactorError, match="it broke"):
            exporting.export(bank, Mix.of("x"), "logit-bias", tmp_path / name, force=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deeper", "old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_an_export_does_not_work_for_an_output_that_it_may_not_replace(tiny, adapters_root, tmp_path):
    bank = AdapterBank(tiny, adapters_root)
    for place in (tmp_path, tmp_path / "m.onnx", tmp_path / "m.onnx.data"):
        place.mkdir(exist_ok=True)
        output = place.with_suffix("") if place.suffix == ".data" else place
        with pytest.raises(XFactorError, match=f"{place} is a folder"):
            exporting.export(bank, Mix.of("x"), "onnx", output, force=True)
        if place != tmp_path:
            place.rmdir()
    (tmp_path / "m.onnx.data").touch()
    with pytest.raises(XFactorError, match=r"m\.onnx\.data exists; pass `force=True`"):
        exporting.export(bank, Mix.of("x"), "onnx", tmp_path / "m.onnx")
    with pytest.raises(XFactorError, match="`force=True` does not replace it"):
        exporting.export(bank, Mix.of("x"), "merged", tmp_path / "m.onnx.data", force=True)


def test_staged_things_take_their_place(tmp_path):
    with staged_file(tmp_path / "a/file") as path:
        path.write_text("1")
        (path.parent / "file.data").write_text("2")
        assert not (tmp_path / "a/file").exists()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["file", "file.data"]
    with staged(tmp_path / "b", force=False) as folder:
        (folder / "file").write_text("1")
    assert (tmp_path / "b/file").read_text() == "1"
    assert not list(tmp_path.rglob(".*"))


def test_nothing_else_takes_the_place_of_an_unfinished_run(adapters_root, tmp_path, run):
    root = shutil.copytree(adapters_root, tmp_path / "adapters")
    kept = [root / ".new.partial" / name for name in ("settings.json", "checkpoints/step-1.pt")]
    kept[1].parent.mkdir(parents=True)
    for path in kept:
        path.write_text("hours of work")
    unfinished = r"an unfinished run of new is in .*\.new\.partial; resume it"
    with pytest.raises(XFactorError, match=unfinished), staged(root / "new", force=False):
        pass
    with pytest.raises(XFactorError, match=unfinished):
        combine(Mix.of("x"), root / "new", root)
    with pytest.raises(XFactorError, match=unfinished):
        rename_adapter("x", "new", root)
    refused = run("unslop", "--model", "nowhere", "--output", "adapters/new", code=2).output
    assert "an unfinished run of new is in" in " ".join(refused.split())
    combine(Mix.of("x"), root / "new", root, force=True)
    with staged_file(root / "new") as path:  # of the same name
        assert path.parent != kept[0].parent
    assert {path.read_text() for path in kept} == {"hours of work"}


def test_what_cannot_be_moved_into_place_leaves_the_old(tmp_path):
    with staged(tmp_path / "a", force=False) as folder:
        (folder / "xfactor.json").write_text("old")
    with pytest.raises(OutOfRoom, match="nothing was replaced"), staged(tmp_path / "a", force=True) as folder:
        shutil.rmtree(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a/xfactor.json").read_text() == "old"


def test_two_do_not_make_the_same_at_once(tmp_path):
    with staged(tmp_path / "a", force=False) as folder:
        (folder / "file").write_text("1")
        with (
            pytest.raises(XFactorError, match=r"another run .*is writing .*\.a\.making"),
            staged(tmp_path / "a", force=False),
        ):
            pass
    assert (tmp_path / "a/file").read_text() == "1"
    left = tmp_path / ".b.making/old"  # of a process that was killed
    left.mkdir(parents=True)
    with staged(tmp_path / "b", force=False):
        assert not left.exists()


def test_the_reason_for_the_demo_model_ends_at_a_word(monkeypatch, tmp_path):
    """The line that names the model is whole, however much the Hub's client has to say."""
    long = "Connection to the proxy.example failed: " + "and this is why it did " * 8 + "in the end"

    def fail(*_, **__):
        raise OSError(long)

    monkeypatch.setattr(resolve, "snapshot_download", fail)
    assert resolve.resolve_model().reason.endswith("why it did in the end")
    long = "word " * 200
    assert resolve.resolve_model().reason.endswith("word …")
