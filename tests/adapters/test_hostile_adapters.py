"""Adapters made to do harm: each gives one clear error, and the model stays as it was."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.editing import edit_config, edit_weights, first, logits
from xfactor_peft.adapters.adapter import read_adapter
from xfactor_peft.adapters.catalogue import catalogue, facts, rename_adapter
from xfactor_peft.adapters.combine import combine
from xfactor_peft.adapters.compare import compare
from xfactor_peft.adapters.mix import Mix
from xfactor_peft.bank.bank import AdapterBank
from xfactor_peft.base.loading import load_base
from xfactor_peft.base.resolve import resolve_model
from xfactor_peft.errors import XFactorError
from xfactor_peft.options import LoadOptions
from xfactor_peft.tokens import scan
from xfactor_peft.tokens.rule import Rule
from xfactor_peft.tokens.token_set import TokenSet

ROOT = Path(__file__).parents[2]
WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "xfactor.json"


def edit_record(**parts):
    def apply(folder):
        path = folder / RECORD
        path.write_text(json.dumps(json.loads(path.read_text()) | parts))

    return apply


def huge_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}" * 50)


def pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(1)}, folder / "adapter_model.bin")


def linked_out(folder):
    outside = folder.parent / "secret.safetensors"
    shutil.move(folder / WEIGHTS, outside)
    (folder / WEIGHTS).symlink_to(outside)


def pipe(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def deep(folder):
    (folder / CONFIG).write_text("[" * 100_000 + "]" * 100_000)


def flipped(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-2] ^= 1  # the last number stays finite
    (folder / WEIGHTS).write_bytes(data)


def one_side(tensors):
    del tensors[first(tensors)]


def a_layer_less(tensors):
    layer = first(tensors).split(".lora_")[0]
    for key in [key for key in tensors if key.startswith(layer)]:
        del tensors[key]


def on(path):
    """The first layer's weights under the name of something that is no linear layer."""

    def apply(tensors):
        layer = first(tensors).split(".lora_")[0]
        for key in [key for key in tensors if key.startswith(f"{layer}.")]:
            tensors[key.replace(layer, f"base_model.model.{path}")] = tensors.pop(key)

    return edit_weights(apply)


HOSTILE = {
    "huge header": (huge_header, "a header of 4611686018427387904 bytes"),
    "a flipped bit": (flipped, "changed since it was saved"),
    "pickle": (pickled, "is a pickle, which can run any code"),
    "link out": (linked_out, "is a link that leads out of its folder"),
    "pipe": (pipe, "is not a plain file"),
    "deep json": (deep, "cannot be read as JSON"),
    "whole numbers": (edit_weights(lambda t: t.update({first(t): t[first(t)].int()})), r"holds torch.int32"),
    "one side": (edit_weights(one_side), "has no A.weight"),
    "a layer less": (edit_weights(a_layer_less), "no weights for"),
    "on a norm": (on("transformer.ln_f"), "transformer.ln_f is not a linear layer"),
    "on a block": (on("transformer.h.0"), "transformer.h.0 is not a linear layer"),
    "on nothing": (on("transformer.h.9.attn.c_attn"), "has no layer transformer.h.9"),
    "no shape": (edit_weights(lambda t: t.update({first(t): torch.tensor(1.0)})), "does not fit the layer"),
    "a rank of a thousand million": (edit_config(r=10**9), "r must be a whole number from 1 to 65536"),
    "another rank": (edit_config(r=16), "is of rank 8 and 8, not 16"),
    "rank as text": (edit_config(r="8"), "r must be a whole number"),
    "slow pattern": (edit_config(rank_pattern={"(a+)+$": 8}), "rank_pattern must be plain layer names"),
    "no targets": (edit_config(target_modules=7), "target_modules must be a list of layer names"),
    "more modules": (edit_config(modules_to_save=["lm_head"]), "modules_to_save is not supported"),
    "repeated layers": (edit_config(layer_replication=[[0, 2], [0, 2]]), "layer_replication is not supported"),
    "a module to import": (edit_config(megatron_config={}, megatron_core="os"), None),
    "another base by name": (edit_config(base_model_name_or_path="someone/else"), "names the base 'someone/else'"),
    "alpha": (edit_config(lora_alpha=float("inf")), "lora_alpha must be a finite number"),
    "type": (edit_config(peft_type=["LORA"]), "only LORA is"),
    "record": (edit_record(after=[1]), "no object under after"),
    "rule": (edit_record(tokens={"rule": {"kind": "regex", "value": 3}}), "tokens.rule is"),
    "dial": (edit_record(rate={"dial": [["a", "b"]]}), "rate.dial"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_adapters_change_nothing(tiny, adapters_root, tmp_path, kind):
    change, message = HOSTILE[kind]
    folder = shutil.copytree(adapters_root / "x", tmp_path / "x")
    change(folder)
    bank = AdapterBank(tiny, adapters_root)
    bank.load("z")
    bank.use("z", 0.7)
    before, names = logits(bank.model), [name for name, _ in tiny.model.named_modules()]
    started = time.perf_counter()
    if message is None:  # has no effect, but is not the file that was saved
        message = "changed since it was saved"
    with pytest.raises(XFactorError, match=message) as caught:
        bank.load(str(folder))
    assert time.perf_counter() - started < 20
    assert "\n" not in str(caught.value)
    assert (list(bank.adapters), bank.active.parts) == (["z"], (("z", 0.7),))
    assert [name for name, _ in tiny.model.named_modules()] == names
    assert torch.equal(logits(bank.model), before)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_adapters_are_one_error_without_a_model_too(adapters_root, tmp_path, kind):
    """Listed, shown, compared, mixed, renamed: a result or an XFactorError, nothing else."""
    root = Path(shutil.copytree(adapters_root, tmp_path / "adapters"))
    HOSTILE[kind][0](root / "x")
    assert [entry.name for entry in catalogue(root)] == ["head", "x", "z"]
    for act in (
        lambda: facts(read_adapter(root / "x")),
        lambda: compare(read_adapter(root / "x"), read_adapter(root / "z")),
        lambda: combine(Mix((("x", 0.5), ("z", 1.0))), root / "mixed", root),
        lambda: combine(Mix((("z", 0.5), ("x", 1.0))), root / "mixed", root, force=True),
        lambda: rename_adapter("x", "y", root),
    ):
        with suppress(XFactorError):
            act()


def test_what_a_configuration_says_besides_has_no_effect(tiny, adapters_root, tmp_path):
    """Keys that PEFT would act on (an import, an initialisation of the base) never reach it."""
    folder = shutil.copytree(adapters_root / "x", tmp_path / "x")
    (folder / RECORD).unlink()
    edit_config(megatron_core="antigravity", loftq_config={"loftq_bits": 1}, auto_mapping={"parent_library": "os"})(
        folder
    )
    bank = AdapterBank(tiny, adapters_root)
    bank.load("x")
    bank.use("x")
    expected = logits(bank.model)
    bank.load(str(folder))
    bank.use(str(folder))
    assert torch.equal(logits(bank.model), expected)
    assert "antigravity" not in sys.modules


def test_without_a_record_the_base_s_name_is_compared(tiny, adapters_root, tmp_path):
    folder = shutil.copytree(adapters_root / "x", tmp_path / "x")
    (folder / RECORD).unlink()
    edit_config(base_model_name_or_path="someone/else")(folder)
    with pytest.raises(XFactorError, match=r"names the base 'someone/else', but the model here is .*gpt2"):
        AdapterBank(tiny, adapters_root).load(str(folder))


def test_a_link_inside_a_cache_of_the_hub_is_read(tiny, adapters_root, tmp_path):
    """Snapshots of the Hub's cache are links to the repository's blobs, which are its own files."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        shutil.copy(adapters_root / "x" / name, blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert AdapterBank(tiny, adapters_root).load(str(snapshot)).shapes


@pytest.mark.parametrize(
    "pattern", ["(.*)(.*)(.*)(.*)(.*)(.*)(.*)=\\d!", "-?" * 30 + "-" * 30 + "x", "(?:" * 60 + "a?" + "){3}" * 60]
)
def test_a_pattern_that_never_ends_is_stopped(tiny, monkeypatch, pattern):
    """The vocabulary holds texts on which each of them takes longer than anyone waits."""
    monkeypatch.setattr(scan, "SECONDS", 2.0)
    tiny.tokenizer.add_tokens(["-" * 59, "a" * 400])
    rule, start = Rule.from_record({"kind": "regex", "value": pattern}), time.monotonic()
    with pytest.raises(XFactorError, match="takes more than 2 s over the vocabulary"):
        TokenSet.from_rule(tiny.tokenizer, rule)
    assert time.monotonic() - start < 20


def test_a_stranger_s_record_cannot_hang_its_reader(tiny, adapters_root, tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "SECONDS", 1.0)
    folder = Path(shutil.copytree(adapters_root / "x", tmp_path / "x"))
    record = json.loads((folder / RECORD).read_text())
    record["tokens"]["rule"] = {"kind": "regex", "value": "(?:" * 60 + "a?" + "){3}" * 60, "ignore_case": False}
    (folder / RECORD).write_text(json.dumps(record))
    bank = AdapterBank(tiny, adapters_root)
    bank.load(str(folder))
    with pytest.raises(XFactorError, match="takes more than 1 s"):
        bank.token_set(str(folder))


def test_a_model_s_own_code_is_not_run(tiny_folders, tmp_path):
    """A folder whose configuration names code of its own: no prompt, no import, one error."""
    folder = shutil.copytree(tiny_folders["gpt2"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(XFactorError):
        load_base(resolve_model(str(folder)), LoadOptions("fp32"))
    assert not (tmp_path / "ran").exists()


def test_no_call_trusts_remote_code():
    for path in (ROOT / "xfactor_peft").rglob("*.py"):
        assert "trust_remote_code=True" not in path.read_text(encoding="utf-8"), path


def test_fuzz_in_short(tmp_path):
    """The script of docs/reliability.md on a few hundred inputs; its control: a check that is switched off is found."""
    script = [sys.executable, ROOT / "benchmarks/fuzz_adapters.py", "--inputs", "300", "--seed", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(script, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout
    assert "'inputs': 300" in result.stdout


def test_the_fuzz_notices_a_model_that_changed(tmp_path):
    from benchmarks import fuzz_adapters

    bank = fuzz_adapters.prepare(tmp_path)
    before = fuzz_adapters.fingerprint(bank)
    assert fuzz_adapters.fingerprint(bank) == before
    with torch.no_grad():
        next(bank.base.model.parameters()).view(-1)[0] += 1
    assert fuzz_adapters.fingerprint(bank) != before


def test_files_of_weights_are_read_once_they_are_whole(adapters_root, tmp_path):
    """Cut at every length of the header and at many of the data."""
    from xfactor_peft.adapters.files import read_shapes

    whole = (adapters_root / "z" / WEIGHTS).read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    path = tmp_path / WEIGHTS
    for cut in [*range(0, length, 7), *range(length, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(XFactorError, match="cannot be read as safetensors"):
            read_shapes(path)
    path.write_bytes(whole)
    assert read_shapes(path) == {key: tuple(value.shape) for key, value in load_file(path).items()}
    save_file({}, path)
    with pytest.raises(XFactorError, match="holds no tensor"):
        read_shapes(path)
