"""A network that fails in every way, against the local stand-in: clear words, no secrets, and no file twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from tests.tiny import tiny_model_folder
from xfactor_peft.base.resolve import resolve_model, without_secrets
from xfactor_peft.errors import XFactorError

pytest_plugins = ["tests.hub.hub_fixture"]

NAME, TOKEN = "someone/tiny", "hf_averysecrettoken"
PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model_folder("gpt2", tmp_path_factory.mktemp("served"))


@pytest.fixture
def online(hub, model, tmp_path, monkeypatch, capfd):
    """This process's client set to the stand-in, with a token and a cache of its own, and no pauses between tries."""
    hub.add(NAME, model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/{repo_id}")[1]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}{template}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    close_session()

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
def test_refusals(hub, online, fault, words):
    hub.fail("/*", **fault)
    error = online()
    assert f"Error: --model {NAME}" in error
    assert words in error


def test_cut_off_then_resumed(hub, online, model, tmp_path, monkeypatch):
    """Cut off every time it is an error; cut off once, the rest of the file is asked for, not all of it."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 5_000)  # the client keeps whole chunks, usually of 10 MB
    hub.fail("/storage/*.safetensors", cut_after=0)
    assert "check the connection and try again" in online()
    hub.heal()
    hub.fail("/storage/*.safetensors", cut_after=20_000, times=1)
    before = len(hub.requests)
    assert not online().startswith("Error")
    asked = [r for r in hub.requests[before:] if r.method == "GET" and r.path.startswith("/storage")]
    assert [r.range for r in asked] == [None, "bytes=20000-"]
    kept = next((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    assert kept.read_bytes() == (model / "model.safetensors").read_bytes()
    stored = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in stored)


def test_a_wrong_checksum_is_noticed_and_mended(hub, online, model):
    wrong = bytearray((model / "model.safetensors").read_bytes())
    wrong[-1] ^= 1
    hub.fail("/storage/*.safetensors", content=bytes(wrong))
    assert "model.safetensors arrived damaged (wrong SHA-256) and was removed; try again" in online()
    hub.heal()
    assert not online().startswith("Error")


def test_no_name_server(tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://no-such-host.invalid", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN, "NO_PROXY": "*", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, PROJECT / "cli.py", "tokens", "--model", NAME],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    output = " ".join((result.stdout + result.stderr).split())
    assert (result.returncode, "cannot be downloaded" in output) == (2, True), output
    assert "check the connection" in output
    assert TOKEN not in output


def test_secrets_are_taken_out_of_messages():
    text = "GET https://host/file?X-Amz-Signature=abc&token=hf_abc 'Bearer hf_abcDEF123' failed"
    assert without_secrets(text) == "GET https://host/file 'Bearer hf_...' failed"
    with pytest.raises(XFactorError, match="no such folder"):
        resolve_model("./nowhere")
