"""A network that fails in every way, against the local stand-in: clear words, no secrets, and no file twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants, hf_hub_download

from tests.hub.hub_fixture import set_endpoint
from tests.tiny import tiny_model_folder
from xfactor_peft.base.resolve import resolve_model, without_secrets
from xfactor_peft.errors import XFactorError

pytest_plugins = ["tests.hub.hub_fixture"]

NAME, TOKEN = "someone/tiny", "hf_averysecrettoken"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_folder("gpt2", tmp_path_factory.mktemp("served"))


@pytest.fixture
def resolved(online, model, monkeypatch, capfd):
    """A function that resolves the model of the stand-in, with a token and a cache of its own."""
    online.add(NAME, model)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def find() -> str:
        """The folder of the model, or what is said instead; never the token."""
        try:
            found = str(resolve_model(NAME).folder)
        except XFactorError as error:
            found = f"Error: {error}"
        printed = capfd.readouterr()
        assert TOKEN not in found + printed.out + printed.err
        assert "\n" not in found
        return found

    return find


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 401}, "log in"),
        ({"status": 403}, "log in again with `hf auth login`"),
        ({"status": 404, "code": "RepoNotFound"}, "no such repository on the Hub"),
        ({"status": 429}, "the Hub asks to slow down: try again in a few minutes"),
        ({"status": 503}, "the Hub is in trouble: try again later"),
    ],
)
def test_refusals(hub, resolved, fault, words):
    hub.fail("/*", **fault)
    error = resolved()
    assert f"Error: `model={NAME}`" in error
    assert words in error


def test_cut_off_then_resumed(hub, resolved, model, tmp_path, monkeypatch):
    """Cut off every time it is an error; cut off once, the rest of the file is asked for, not all of it."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 5_000)  # the client keeps whole chunks, usually of 10 MB
    hub.fail("/storage/*.safetensors", cut_after=0)
    assert "check the connection and try again" in resolved()
    hub.heal()
    hub.fail("/storage/*.safetensors", cut_after=20_000, times=1)
    before = len(hub.requests)
    assert not resolved().startswith("Error")
    asked = [r for r in hub.requests[before:] if r.method == "GET" and r.path.startswith("/storage")]
    assert [r.range for r in asked] == [None, "bytes=20000-"]
    kept = next((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    assert kept.read_bytes() == (model / "model.safetensors").read_bytes()
    stored = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in stored)


def test_a_wrong_checksum_is_noticed_and_mended(hub, resolved, model):
    wrong = bytearray((model / "model.safetensors").read_bytes())
    wrong[-1] ^= 1
    hub.fail("/storage/*.safetensors", content=bytes(wrong))
    assert "model.safetensors arrived damaged (wrong SHA-256) and was removed; try again" in resolved()
    hub.heal()
    assert not resolved().startswith("Error")


def test_what_another_program_left_out_is_fetched(hub, online, model, tmp_path):
    """It cached the configuration and the weights: offline that is no model, online the rest comes."""
    served = shutil.copytree(model, tmp_path / "served")
    (served / "consolidated.safetensors").write_bytes(b"the same weights once more")
    hub.add(NAME, served)
    for file in ("config.json", "model.safetensors"):
        hf_hub_download(NAME, file, cache_dir=constants.HF_HUB_CACHE)
    with pytest.raises(XFactorError, match="not in the local cache"):
        resolve_model(NAME, offline=True)
    found = resolve_model(NAME)
    assert found.reason == "downloaded from the Hub"
    assert {path.name for path in found.folder.iterdir()} == {path.name for path in model.iterdir()}
    again = resolve_model(NAME, offline=True)
    assert (again.reason, again.folder) == ("in the local cache", found.folder)


def test_no_name_server(online, run, monkeypatch, capfd):
    set_endpoint(monkeypatch, "http://no-such-host.invalid")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    said = run("tokens", "--model", NAME, code=2).output
    printed = capfd.readouterr()
    output = " ".join((said + printed.out + printed.err).split())
    assert "cannot be downloaded" in output
    assert "check the connection" in output
    assert TOKEN not in output
    assert online.requests == []


def test_secrets_are_taken_out_of_messages():
    text = "GET https://host/file?X-Amz-Signature=abc&token=hf_abc 'Bearer hf_abcDEF123' failed"
    assert without_secrets(text) == "GET https://host/file 'Bearer hf_...' failed"
    with pytest.raises(XFactorError, match="no such folder"):
        resolve_model("./nowhere")
