"""The `hub` fixture; a conftest or a test module loads it with `pytest_plugins = ["tests.hub.hub_fixture"]`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hub.hub_stand_in import HubStandIn


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    """A Hub on loopback without repositories (`hub.add(name, folder)`); fails a test that tried to leave it."""
    with HubStandIn() as stand_in:
        yield stand_in
    assert stand_in.strays == [], "a request was meant for another host"
