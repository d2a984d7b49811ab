"""What the tests with ACLs share; after each of them, no secret is in anything that was written."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from consul_prom.worker.worker import Worker
from tests.acl.access import Access, Make


@pytest.fixture(scope="session")
def guarded() -> Iterator[Access]:
    """A Consul that denies by default, whose agent has a token of its own."""
    access = Access()
    with access.consul:
        yield access


@pytest.fixture(scope="session")
def helpless() -> Iterator[Access]:
    """The same, but its agent has no token of its own."""
    access = Access(agent_token=False)
    with access.consul:
        yield access


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """Where a token may be put."""
    return tmp_path / "token"


@pytest.fixture
def make(slot_directory: Path, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Workers of the service shop that look each second, and that are stopped in the end."""
    monkeypatch.setattr("consul_prom.consul.registrar.TURN", 1)
    made: list[Worker] = []

    def make(access: Access, **arguments: Any) -> Worker:
        defaults = {"service": "shop", "host": "web-1", "dir": slot_directory, "check_interval": 1}
        made.append(Worker(**{"registry": registry, "consul_http_addr": access.consul.url, **defaults, **arguments}))
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


@pytest.fixture(autouse=True)
def _no_secret_is_written(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[None]:
    """Nothing that a test made anybody log or print, not even with DEBUG, has a secret in it."""
    caplog.set_level(logging.DEBUG)
    yield
    formatter = logging.Formatter()
    written = [formatter.format(record) for record in caplog.get_records("call")]
    written += [*capfd.readouterr()]
    for name in ("guarded", "helpless"):
        if name in request.fixturenames:
            found = [text for text in written for each in request.getfixturevalue(name).secrets if each in text]
            assert not found, found
