"""The Hub stand-in treats huggingface_hub and transformers as the Hub does, in success and in failure."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import HfApi, close_session, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from safetensors.torch import load_file

from tests.hub.hub_stand_in import HubStandIn
from tests.tiny import tiny_tokenizer
from tools.make_checkpoint import write_checkpoint

pytest_plugins = ["tests.hub.hub_fixture"]

NAME = "openai-community/gpt2-medium"
PROJECT = Path(__file__).parents[2]
LOAD = """
import hashlib, json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
bytes_of = lambda weight: weight.detach().numpy().tobytes()
weights = {name: hashlib.sha256(bytes_of(weight)).hexdigest() for name, weight in model.named_parameters()}
print(json.dumps([weights, tokenizer("An X-ray")["input_ids"]]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the exact layout of the Hub's gpt2 files."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(tokenizer)
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "tiny", tokenizer=tokenizer)
    (folder / "extra").mkdir()
    (folder / "extra" / "notes é.txt").write_text("a name that has to be quoted, in a folder of its own")
    return folder


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh client in this process, online, without proxy, token or pauses between attempts."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    close_session()


def snapshot(hub: HubStandIn, cache: Path, name: str = NAME, **options) -> Path:
    options.setdefault("token", False)
    return Path(snapshot_download(name, endpoint=hub.url, cache_dir=cache, **options))


def test_a_snapshot_equals_the_folder(hub: HubStandIn, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(NAME, checkpoint)
    found = snapshot(hub, tmp_path)
    assert found.name == hub.commit(NAME)
    for file in (path for path in checkpoint.rglob("*") if path.is_file()):
        assert (found / file.relative_to(checkpoint)).read_bytes() == file.read_bytes()
    before = len(hub.requests)
    assert snapshot(hub, tmp_path) == found
    assert len(hub.requests) == before + 1  # the second time only the commit is asked for


def test_large_files_come_from_another_address_without_the_token(
    hub: HubStandIn, checkpoint: Path, tmp_path: Path
) -> None:
    hub.add(NAME, checkpoint)
    snapshot(hub, tmp_path, token="hf_secret")
    by_token = {request.path.split("/")[1]: request.with_token for request in hub.requests}
    assert by_token == {"api": True, "openai-community": True, "storage": False}


def test_a_download_that_was_cut_off_resumes(
    hub: HubStandIn, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the client keeps are whole chunks; of a file shorter than its usual 10 MB it would keep nothing.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.add(NAME, checkpoint)
    hub.fail("*/model.safetensors", cut_after=100_000, times=1)
    found = snapshot(hub, tmp_path)
    assert (found / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    gets = [request for request in hub.requests if request.path.startswith("/storage/")]
    assert [(request.status, request.range) for request in gets] == [(200, None), (206, "bytes=100000-")]


def test_a_download_cut_off_every_time_fails(hub: HubStandIn, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(NAME, checkpoint)
    hub.fail("*/model.safetensors", cut_after=0)
    with pytest.raises(httpx.RemoteProtocolError, match="without sending complete message body"):
        snapshot(hub, tmp_path)
    with pytest.raises(IncompleteSnapshotError, match=r"model\.safetensors"):
        snapshot(hub, tmp_path, local_files_only=True)


def test_what_does_not_exist(hub: HubStandIn, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(NAME, checkpoint, revisions=("main", "refs/pr/1"))
    with pytest.raises(RepositoryNotFoundError, match="401"):
        snapshot(hub, tmp_path, "nobody/nothing")
    with pytest.raises(RepositoryNotFoundError, match="404"):
        snapshot(hub, tmp_path, "nobody/nothing", token="hf_secret")
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: v9"):
        snapshot(hub, tmp_path, revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(NAME, "absent.json", endpoint=hub.url, cache_dir=tmp_path, token=False)
    assert snapshot(hub, tmp_path, revision="refs/pr/1").name == hub.commit(NAME)


def test_a_gated_repository(hub: HubStandIn, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(NAME, checkpoint)
    hub.gate(NAME)
    assert HfApi(endpoint=hub.url, token=False).model_info(NAME).sha == hub.commit(NAME)
    with pytest.raises(GatedRepoError, match="Access to model openai-community/gpt2-medium is restricted"):
        snapshot(hub, tmp_path)


@pytest.mark.parametrize("status", [403, 404, 429, 500, 503])
def test_a_hub_in_trouble(hub: HubStandIn, checkpoint: Path, tmp_path: Path, status: int) -> None:
    hub.add(NAME, checkpoint)
    found = snapshot(hub, tmp_path / "filled")
    hub.fail("*", status=status)
    with pytest.raises(LocalEntryNotFoundError) as caught:
        snapshot(hub, tmp_path / "empty")
    assert isinstance(caught.value.__cause__, HfHubHTTPError)
    assert caught.value.__cause__.response.status_code == status
    assert snapshot(hub, tmp_path / "filled") == found  # the cache serves
    hub.heal()
    assert snapshot(hub, tmp_path / "empty").name == found.name


def test_a_refused_token(hub: HubStandIn, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(NAME, checkpoint)
    hub.fail("*", status=401, message="Invalid credentials in Authorization header")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        snapshot(hub, tmp_path, token="hf_wrong")
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_an_unreachable_hub(hub: HubStandIn, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(NAME, checkpoint)
    found = snapshot(hub, tmp_path / "filled")
    hub.close()
    with pytest.raises(LocalEntryNotFoundError) as caught:
        snapshot(hub, tmp_path / "empty")
    assert isinstance(caught.value.__cause__, httpx.ConnectError)
    assert snapshot(hub, tmp_path / "filled") == found


def test_a_slow_hub(hub: HubStandIn, checkpoint: Path) -> None:
    hub.add(NAME, checkpoint)
    hub.fail("/api/*", delay=30)
    with pytest.raises(httpx.TimeoutException):
        HfApi(endpoint=hub.url, token=False).model_info(NAME, timeout=0.2)


def test_wrong_content(hub: HubStandIn, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(NAME, checkpoint)
    hub.fail("/storage/*", content=b"short")
    with pytest.raises(OSError, match="Consistency check failed"):
        snapshot(hub, tmp_path / "short")
    hub.fail("*", content=b"<html>Please log in to this network</html>")
    with pytest.raises(json.JSONDecodeError):
        snapshot(hub, tmp_path / "portal")


def test_requests_for_other_hosts_stop_here(checkpoint: Path, tmp_path: Path) -> None:
    code = "import urllib.request\ntry: urllib.request.urlopen('{}')\nexcept OSError as error: print(error)"
    with HubStandIn({NAME: checkpoint}) as hub:
        for url in ("http://huggingface.co/x", "https://huggingface.co/x"):
            arguments = [sys.executable, "-c", code.format(url)]
            result = subprocess.run(
                arguments, env=hub.environment(tmp_path), capture_output=True, text=True, check=True
            )
            assert "403" in result.stdout
        assert hub.strays == ["GET http://huggingface.co/x", "CONNECT huggingface.co:443"]
        assert hub.requests == []


def test_ranges(hub: HubStandIn, checkpoint: Path) -> None:
    hub.add(NAME, checkpoint)
    expected = (checkpoint / "config.json").read_bytes()
    request = urllib.request.Request(f"{hub.url}/{NAME}/resolve/main/config.json")
    request.add_header("Range", "bytes=10-19")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
        assert (response.status, response.read()) == (206, expected[10:20])
        assert response.headers["Content-Range"] == f"bytes 10-19/{len(expected)}"


def test_from_pretrained_by_name_then_offline(hub: HubStandIn, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(NAME, checkpoint)

    def load(**variables: str) -> list:
        environment = hub.environment(tmp_path, **variables)
        command = [sys.executable, "-c", LOAD, NAME]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    weights, ids = load(OMP_NUM_THREADS="1")
    assert any(path.startswith("/storage/") for path in hub.paths("GET"))
    local = {
        name: hashlib.sha256(weight.numpy().tobytes()).hexdigest()
        for name, weight in load_file(checkpoint / "model.safetensors").items()
        if not name.endswith(".attn.bias")
    }
    assert {name.removeprefix("transformer."): digest for name, digest in weights.items()} == local
    assert ids == tiny_tokenizer()("An X-ray")["input_ids"]
    hub.close()
    asked = len(hub.requests)
    assert load(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1") == [weights, ids]
    assert len(hub.requests) == asked
