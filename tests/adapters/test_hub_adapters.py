"""Adapters pushed to and pulled from the local stand-in of the Hub."""

import json
import os
import shutil
from functools import partial

import pytest
import torch
from huggingface_hub import HfApi, close_session, constants, snapshot_download
from peft import PeftModel

from tests.adapters.editing import logits
from tests.tiny import tiny_model
from xfactor_peft.adapters.card import model_card
from xfactor_peft.adapters.hub import check_push, pull
from xfactor_peft.errors import XFactorError

pytest_plugins = ["tests.hub.hub_fixture"]
REPO = "someone/x-factor"


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """The package's Hub calls go to the stand-in, with a token."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    download = partial(snapshot_download, endpoint=hub.url, cache_dir=tmp_path / "cache", token="hf_test")
    monkeypatch.setattr("xfactor_peft.adapters.hub.HfApi", partial(HfApi, endpoint=hub.url, token="hf_test"))
    monkeypatch.setattr("xfactor_peft.adapters.hub.snapshot_download", download)
    monkeypatch.setattr("xfactor_peft.adapters.hub.get_token", lambda: "hf_test")
    yield hub
    close_session()


def test_push_and_pull(online, hub, run, adapters_root, tmp_path):
    shutil.copytree(adapters_root, tmp_path / "adapters")
    pushed = run("adapters", "push", "x", REPO).output
    assert f"{hub.url}/{REPO}" in pushed
    files = hub.repos[REPO].files
    assert {"adapter_config.json", "adapter_model.safetensors", "xfactor.json", "README.md"} <= files.keys()
    card = files["README.md"].read_text()
    assert "base_model: " not in card, "the base is a folder, and no address of the Hub's"
    for words in ("R, share of generated tokens", "KL from the base", "PeftModel.from_pretrained"):
        assert words in card
    if "training.png" in files:
        assert "](training.png)" in card
        assert files["training.png"].read_bytes()[1:4] == b"PNG"
    assert "training.png" not in (tmp_path / "adapters/x/README.md").read_text()

    assert "pulled" in run("adapters", "pull", REPO, "--as", "again").output
    again = tmp_path / "adapters/again"
    assert (again / "adapter_model.safetensors").read_bytes() == (
        adapters_root / "x/adapter_model.safetensors"
    ).read_bytes()
    assert "sha256:     ok" in run("adapters", "verify", "again", "--files-only").output
    plain = [PeftModel.from_pretrained(tiny_model("gpt2"), folder).eval() for folder in (again, adapters_root / "x")]
    assert torch.equal(logits(plain[0]), logits(plain[1]))
    assert "exists; pass --force" in run("adapters", "pull", REPO, "--as", "again", code=2).output


def test_what_cannot_be_pulled_leaves_nothing(online, hub, run, adapters_root, tiny_folders, tmp_path):
    hub.add("someone/model", tiny_folders["gpt2"])
    broken = shutil.copytree(adapters_root / "x", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\x08" * 40)
    hub.add("someone/broken", broken)
    for repo, message in {
        "someone/none": "no such repository on the Hub, or it is private",
        "someone/model": "holds no adapter_config.json, so it is not an adapter",
        "someone/broken": "cannot be read as safetensors",
    }.items():
        output = run("adapters", "pull", repo, code=2).output
        assert message in output
        assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == []


def test_a_refused_push_is_one_line(online, hub, run, adapters_root, monkeypatch):
    hub.fail("/api/repos/create", methods=("POST",), status=403, message="You don't have the rights")
    root = ["--adapters-dir", adapters_root]
    output = run("adapters", "push", "x", REPO, *root, code=2).output
    assert f"{REPO} cannot be pushed" in output
    assert "Traceback" not in output
    monkeypatch.setattr("xfactor_peft.adapters.hub.get_token", lambda: None)
    assert "needs a token" in run("adapters", "push", "x", REPO, *root, code=2).output


def test_a_card_that_the_hub_refuses_is_one_line(online, hub, run, adapters_root):
    refusal = '"base_model" with value "./here" is not valid'
    hub.fail("/api/validate-yaml", methods=("POST",), status=400, message=refusal)
    output = run("adapters", "push", "x", REPO, "--adapters-dir", adapters_root, code=2).output
    assert f"Invalid metadata in README.md. - {refusal}; correct {adapters_root / 'x/README.md'}" in output
    assert output.count("\n") == 1


def test_no_network_is_one_line(online, hub, run, adapters_root):
    hub.close()
    output = run("adapters", "push", "x", REPO, "--adapters-dir", adapters_root, code=2).output
    assert f"{REPO} cannot be pushed: " in output
    assert "; check the connection" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "revision", "linked"),
    [("owner/name", "0" * 40, True), ("owner/name:q/f.gguf", "0" * 40, False), ("models/gpt2", None, False)],
)
def test_a_card_links_to_a_base_of_the_hub_alone(adapters_root, name, revision, linked):
    record = json.loads((adapters_root / "x/xfactor.json").read_text())
    record["base"] |= {"name": name, "revision": revision}
    assert (f"base_model: {name}\n" in model_card(record)) == linked
    assert ("base_model" in model_card(record)) == linked


def test_training_with_push(online, hub, run, tiny_folders):
    brief = ["--steps", 2, "--seq-len", 8, "--eval-tokens", 4, "--eval-repeats", 1, "--dtype", "fp32"]
    words = ["train", "--model", tiny_folders["gpt2"], *brief, "--push-to-hub", "someone/new", "--output", "adapters/n"]
    assert "pushed to" in run(*words).output
    assert json.loads(hub.repos["someone/new"].files["xfactor.json"].read_text())["name"] == "n"


def test_checks_before_any_work(run, tiny_folders, monkeypatch, tmp_path):
    monkeypatch.setattr("xfactor_peft.adapters.hub.get_token", lambda: None)
    model = ["--model", tiny_folders["gpt2"]]
    assert "a repository is OWNER/NAME" in run("train", *model, "--push-to-hub", "name", code=2).output
    assert "needs a token" in run("train", *model, "--push-to-hub", "a/b", code=2).output
    with pytest.raises(XFactorError, match="OWNER/NAME"):
        check_push("a/b/c")
    with pytest.raises(XFactorError, match="'a/b c' is no name for a repository: Repo id must use"):
        check_push("a/b c")
    with pytest.raises(XFactorError, match="is no repository on the Hub"):
        pull("abc", tmp_path)
    assert os.listdir(tmp_path) == []


def test_no_secret_is_printed(run, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("403 for https://cdn.example/blob?X-Signature=abc with hf_secret")

    monkeypatch.setattr("xfactor_peft.adapters.hub.snapshot_download", refuse)
    output = run("adapters", "pull", "a/b", code=2).output
    assert "a/b cannot be pulled: 403 for https://cdn.example/blob" in output
    assert "abc" not in output
    assert "secret" not in output
