"""What the tests of this folder share: a real agent, a worker behind a proxy, and others' entries to be left alone."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from consul_prom.consul.client import AgentClient
from tests.faults.scene import LOGGER, Scene
from tests.services.consul import Consul

MakeScene = Callable[..., Scene]

BYSTANDERS: tuple[dict[str, Any], ...] = (
    {"ID": "shop.web-1.1", "Name": "shop-metrics", "Address": "127.0.0.1", "Port": 1, "Meta": {"service": "shop"}},
    {"ID": "shop.elsewhere.0", "Name": "shop-metrics", "Port": 1, "Meta": {"managed_by": "consul-prom"}},
    {"ID": "shop", "Name": "shop", "Address": "127.0.0.1", "Port": 8080, "Tags": ["consul-prom"]},
)


@pytest.fixture(scope="module", autouse=True)
def _told() -> Iterator[None]:
    """The registrar logs what it does, as it would for most."""
    before = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    yield
    LOGGER.setLevel(before)


@pytest.fixture
def consul() -> Iterator[Consul]:
    with Consul() as consul:
        yield consul


@pytest.fixture
def bystanders(consul: Consul) -> Iterator[None]:
    """Entries of others, which are as they were when the test ends."""
    with others(consul):
        yield


@contextmanager
def others(consul: Consul) -> Iterator[None]:
    for entry in BYSTANDERS:
        assert consul.call("/v1/agent/service/register", method="PUT", body=entry)[0] == 200
    before = _documents(consul)
    yield
    assert _documents(consul) == before


def _documents(consul: Consul) -> dict[str, Any]:
    _, found = consul.call("/v1/agent/services")
    return {entry["ID"]: found[entry["ID"]] for entry in BYSTANDERS}


@pytest.fixture
def short_turns() -> Iterator[None]:
    with shortened():
        yield


@contextmanager
def shortened() -> Iterator[None]:
    """Turns and looks at the check of a second, and calls of two, so that nobody waits long for either."""
    defaults = AgentClient.__init__.__kwdefaults__
    assert defaults
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("consul_prom.consul.registrar.TURN", 1.0)
        patch.setattr("consul_prom.consul.registrar.CHECKS", 1.0)
        patch.setitem(defaults, "timeout", 2.0)
        yield


@pytest.fixture
def scene(consul: Consul, tmp_path: Path) -> Iterator[MakeScene]:
    """Makes scenes on the host ``web-1`` that end with the test."""
    with ExitStack() as stack:

        def make(**more: Any) -> Scene:
            return stack.enter_context(Scene(**{"consul": consul, "directory": tmp_path, **more}))

        yield make
