"""What a worker may do with which token, and what it says where that is not enough."""

import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from prometheus_client import CollectorRegistry

from consul_prom.cli import main as cli_main
from consul_prom.consul.acl import write_rule
from consul_prom.server.bind import route_address
from consul_prom.settings.settings import TAG
from consul_prom.worker.worker import Worker
from tests.acl.access import Access, Make, replace
from tests.services.waiting import wait_until
from tests.services.workers import PACKAGE, SCRIPT

RULE = write_rule("shop-metrics")
ENTRY = "shop.web-1.0"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """All but those that a failure is over."""
    loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [line for line in loud if "is registered again" not in line]


def failures(registry: CollectorRegistry, reason: str = "denied") -> float:
    return registry.get_sample_value("consul_prom_sync_failures_total", {"reason": reason}) or 0


def registered(worker: Worker, *, within: float = 20) -> None:
    wait_until(lambda: worker.registered, within=within, what="registered")


def command(access: Access, token: str, *arguments: str) -> Result:
    env = {"CONSUL_HTTP_ADDR": access.consul.url, "CONSUL_HTTP_TOKEN": token, "CONSUL_PROM_HOST": "web-1"}
    return CliRunner().invoke(cli_main.commands, arguments, env=env)


def test_least_policy(guarded: Access, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """With the one rule a worker registers, watches, repairs and deregisters, and finds its address without another."""
    worker = make(guarded, consul_http_token=guarded.token(RULE))
    worker.start()
    registered(worker)
    assert worker.url
    assert worker.url.startswith(f"http://{route_address()}:")
    wait_until(lambda: guarded.catalogue() == {ENTRY: "passing"}, within=20, what="in the catalogue")
    guarded.deregister(ENTRY)
    wait_until(guarded.entries, within=20, what="registered again")
    wait_until(lambda: guarded.catalogue() == {ENTRY: "passing"}, within=20, what="in the catalogue again")
    edited = {"ID": ENTRY, "Name": "shop-metrics", "Meta": guarded.entries()[ENTRY]["Meta"], "Tags": ["edited"]}
    assert guarded.consul.call("/v1/agent/service/register", method="PUT", body=edited)[0] == 200
    wait_until(lambda: guarded.entries()[ENTRY]["Tags"] == [TAG], within=20, what="repaired")
    worker.stop()
    assert (guarded.entries(), guarded.catalogue()) == ({}, {})
    assert not warnings(caplog)


def test_least_policy_of_the_commands(guarded: Access, tmp_path: Path) -> None:
    """With the one rule the commands list a worker, and remove what a killed one has left."""
    token = guarded.token(RULE)
    settings = {"CONSUL_PROM_SERVICE": "shop", "CONSUL_PROM_HOST": "web-1", "CONSUL_PROM_DIR": str(tmp_path / "slots")}
    consul = {"CONSUL_HTTP_ADDR": guarded.consul.url, "CONSUL_HTTP_TOKEN": token, "PYTHONPATH": str(PACKAGE)}
    with subprocess.Popen([sys.executable, "-c", SCRIPT], env={**os.environ, **settings, **consul}) as process:
        try:
            wait_until(guarded.entries, within=60, what="registered")
            listed = command(guarded, token, "list")
            assert (listed.exit_code, str(process.pid) in listed.output) == (0, True), listed.output
            assert command(guarded, token, "deregister").exit_code == 0
            assert guarded.entries(), "a live worker's entry stays"
        finally:
            process.send_signal(signal.SIGKILL)
    removed = command(guarded, token, "deregister")
    assert removed.exit_code == 0, removed.output
    assert (guarded.entries(), guarded.catalogue()) == ({}, {})


@pytest.mark.parametrize(
    ("has", "gets"),
    [
        (lambda _access: "", lambda access, _token: access.grant("", RULE)),
        (lambda access: access.unknown(), lambda access, token: access.token(RULE, text=token)),
        (lambda access: access.token(), lambda access, token: access.grant(token, RULE)),
        (
            lambda access: access.token('service "shop-metrics" { policy = "read" }'),
            lambda access, token: access.grant(token, RULE),
        ),
    ],
    ids=["no token", "unknown token", "no right", "no right to write"],
)
def test_denied(  # noqa: PLR0917  # fixtures
    guarded: Access,
    make: Make,
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
    has: Callable[[Access], str],
    gets: Callable[[Access, str], object],
) -> None:
    """A denial is one WARNING with the rule to add, however often it is met, and ends by itself when that is added."""
    token = has(guarded)
    worker = make(guarded, consul_http_token=token or None)
    worker.start()
    wait_until(lambda: failures(registry) >= 3, within=60, what="three denials")
    (warning,) = warnings(caplog)
    assert re.match(rf"{ENTRY} is not registered: the Consul agent .* answered 403: ", warning)
    assert warning.endswith(f"the token needs the rule: {RULE}")
    assert not guarded.entries()
    gets(guarded, token)
    registered(worker)
    assert f"{ENTRY} is registered again" in caplog.messages
    worker.stop()
    assert not guarded.catalogue()
    assert len(warnings(caplog)) == 1
    if not token:
        guarded.grant("")


def _leave_out(_file: Path) -> None:
    pass


def _fill(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_leave_out, "cannot be read: No such file or directory"),
        (Path.mkdir, r"cannot be read: Is a directory"),
        (_fill(b"\n"), "is empty"),
        (_fill(b"\xff\xfe"), "cannot be read: 'utf-8' codec"),
        (_fill(b"two\nlines"), "holds characters that no HTTP header can carry"),
    ],
    ids=["missing", "directory", "empty", "no text", "two lines"],
)
def test_token_file(  # noqa: PLR0917  # fixtures
    guarded: Access,
    make: Make,
    registry: CollectorRegistry,
    caplog: pytest.LogCaptureFixture,
    token_file: Path,
    spoil: Callable[[Path], object],
    why: str,
) -> None:
    """A token's file that cannot be used is named with the reason, and taken up once it can be."""
    spoil(token_file)
    worker = make(guarded, consul_http_token_file=str(token_file))
    worker.start()
    wait_until(lambda: failures(registry, "token") >= 2, within=60, what="two failures")
    (warning,) = warnings(caplog)
    assert re.search(f"CONSUL_HTTP_TOKEN_FILE={str(token_file)!r} {why}", warning)
    if token_file.is_dir():
        token_file.rmdir()
    replace(token_file, guarded.token(RULE))
    registered(worker)
    worker.stop()
    assert not guarded.catalogue()


@contextmanager
def _as_anybody() -> Iterator[None]:
    """To root nothing is closed, by capabilities of which a thread can do without, and those that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert not libc.capget(head, before)
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~0b110  # effective: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert not libc.capset(head, without)
    try:
        yield
    finally:
        assert not libc.capset(head, before)


def test_closed_token_file(guarded: Access, make: Make, caplog: pytest.LogCaptureFixture, token_file: Path) -> None:
    """A token's file that is closed to us is named with the reason, and taken up once it is open."""
    token_file.write_text(guarded.token(RULE))
    token_file.chmod(0)
    worker = make(guarded, consul_http_token_file=str(token_file))
    with _as_anybody():
        worker.start()
    wait_until(lambda: warnings(caplog), within=60, what="a warning")
    assert "cannot be read: Permission denied" in warnings(caplog)[0]
    token_file.chmod(0o600)
    registered(worker)


def test_reason_changes(
    guarded: Access, make: Make, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture, token_file: Path
) -> None:
    """A missing file that comes with a token of no rights is one more WARNING, at once."""
    worker = make(guarded, consul_http_token_file=str(token_file))
    worker.start()
    wait_until(lambda: failures(registry, "token"), within=60, what="a failure")
    replace(token_file, guarded.token())
    wait_until(lambda: failures(registry), within=60, what="a denial")
    assert [("TOKEN_FILE" in text, "403" in text) for text in warnings(caplog)] == [(True, False), (False, True)]
