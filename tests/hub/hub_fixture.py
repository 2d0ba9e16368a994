"""The fixtures `hub` and `online`; a test module loads them with `pytest_plugins = ["tests.hub.hub_fixture"]`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import close_session, constants

from tests.hub.hub_stand_in import HubStandIn


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    """A Hub on loopback without repositories (`hub.add(name, folder)`); fails a test that tried to leave it."""
    with HubStandIn() as stand_in:
        yield stand_in
    assert stand_in.strays == [], "a request was meant for another host"


def set_endpoint(monkeypatch, url: str) -> None:
    """Have this process look for the Hub at `url`."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/{repo_id}")[1]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}{template}")


@pytest.fixture
def online(hub, tmp_path, monkeypatch) -> Iterator[HubStandIn]:
    """`hub` as this process's Hub, with the cache tmp_path/cache/hub: what `hub.environment` does for another process.

    Every other address leads to the stand-in as a proxy, see `hub.strays`; there are no pauses between tries.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    set_endpoint(monkeypatch, hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, hub.url)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # the client reads the proxies when it begins
    yield hub
    close_session()
