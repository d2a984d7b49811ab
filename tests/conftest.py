"""What all tests share: an environment without settings, a registry, a directory of slots, a maker of settings."""

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from prometheus_client import CollectorRegistry

from consul_prom.devagent import DevAgent, running
from consul_prom.ledger import Ledger
from consul_prom.settings import Settings, load
from tests.services.binaries import RECIPES, prepare
from tests.workers import Workers

MakeSettings = Callable[..., Settings]

FEW = 5
SEVERAL = 100  # who runs fewer tests may need no service
NOT_SETTINGS = {"CONSUL_BIN"}

# How long an example takes says how busy the machine is, and nothing of the code.
hypothesis_settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("unhurried")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what is missing before the first test, where its announcement is seen and no test's time runs."""
    if not session.config.option.collectonly and len(session.items) > SEVERAL:
        prepare(RECIPES)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine that the tests run on reaches them."""
    for name in list(os.environ):
        if name.startswith("CONSUL_") and name not in NOT_SETTINGS:
            monkeypatch.delenv(name)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.delenv("prometheus_multiproc_dir", raising=False)


@pytest.fixture(autouse=True)
def _ledgers_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that a test only imagines killed leaves no descriptor open in the tests' process."""
    made: WeakSet[Ledger] = WeakSet()
    begin, count = Ledger.__init__, itertools.count()

    def noted(ledger: Ledger, *arguments: Any) -> None:
        begin(ledger, *arguments)
        made.add(ledger)
        next(count)

    def end(ledger: Ledger) -> None:
        if vars(ledger):  # its file was opened
            ledger.close()

    monkeypatch.setattr(Ledger, "__init__", noted)
    monkeypatch.setattr(Ledger, "__del__", end, raising=False)
    yield
    for ledger in list(made):
        ledger.close()
    if next(count) > FEW:
        gc.collect()  # a mapping has a descriptor of its own


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def slot_directory(tmp_path: Path) -> Path:
    """A directory for slots as `slots` wants it: ours, and closed to others."""
    directory = tmp_path / "slots"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def agent() -> Iterator[DevAgent]:
    """A dev agent; where real Consul is meant, a module has an `agent` of its own."""
    with running() as agent:
        yield agent


@pytest.fixture
def workers(agent: DevAgent, slot_directory: Path) -> Iterator[Workers]:
    """Starts workers in processes of their own, which register with `agent`."""
    workers = Workers(agent, slot_directory)
    yield workers
    workers.close()


@pytest.fixture
def settings(slot_directory: Path) -> MakeSettings:
    """Makes settings of the service ``shop`` on the host ``web-1``, reachable by loopback; arguments beat these."""

    def make(**arguments: Any) -> Settings:
        defaults = {"service": "shop", "host": "web-1", "address": "127.0.0.1", "dir": slot_directory}
        return load({**defaults, **arguments}, environ={})

    return make


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()
