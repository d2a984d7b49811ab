"""What all tests share: an environment without settings, a registry, a directory of slots, a maker of settings."""

import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from prometheus_client import CollectorRegistry

from consul_prom.devagent import DevAgent, running
from consul_prom.ledger.file import Ledger
from consul_prom.settings.settings import Settings, load
from tests.services import processes
from tests.services.binaries import RECIPES, describe, prepare
from tests.services.workers import Workers

MakeSettings = Callable[..., Settings]

FEW = 5
NOT_SETTINGS = {"CONSUL_BIN"}
NO_SERVICES = "tests/unit"
PER_CORE = 3  # most tests wait for a clock or for another process

# How long an example takes says how busy the machine is, and nothing about the code.
UNHURRIED = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.register_profile("unhurried", UNHURRIED)
hypothesis_settings.register_profile("thorough", UNHURRIED, max_examples=1000)  # --hypothesis-profile=thorough
hypothesis_settings.load_profile("unhurried")

# Without bytecode each process that a test starts compiles the package again, which takes longer than most tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes run the tests; none if all tests are named, because starting them takes longer."""
    cores = len(os.sched_getaffinity(0))
    if all("::" in argument for argument in config.args):
        return 0
    if all(argument.startswith(NO_SERVICES) for argument in config.args):
        return 2 * cores  # these tests wait less
    return PER_CORE * cores


def pytest_configure(config: pytest.Config) -> None:
    """Prepare each process that runs tests for the programs that these start."""
    if hasattr(config, "workerinput") or not config.getoption("tx", None):
        processes.prepare()


def pytest_report_header() -> list[str]:
    """Say where each real program comes from."""
    return describe(RECIPES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Build what is missing before any process runs a test."""
    _prepare(node.config, ids)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Do the same in a run without other processes."""
    if not hasattr(session.config, "workerinput") and not session.config.option.collectonly:
        _prepare(session.config, [item.nodeid for item in session.items])


def _prepare(config: pytest.Config, ids: Sequence[str]) -> None:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if not all(test.startswith(NO_SERVICES) for test in ids):
        prepare(RECIPES, say=reporter.write_line)


def pytest_unconfigure() -> None:
    """End the processes that outlived their test or fixture."""
    processes.end()


@pytest.fixture(autouse=True)
def _processes_end_with_their_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the processes that a failed test left."""
    failures = request.session.testsfailed
    with processes.marked(request.node.nodeid):
        yield
        if request.session.testsfailed > failures:
            processes.end()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine that the tests run on reaches them."""
    for name in list(os.environ):
        if name.startswith("CONSUL_") and name not in NOT_SETTINGS:
            monkeypatch.delenv(name)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.delenv("prometheus_multiproc_dir", raising=False)


@pytest.fixture(autouse=True)
def _nothing_is_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test made us log once, another one may make us log again."""
    monkeypatch.setattr("consul_prom.logs._FACTS", set())


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
