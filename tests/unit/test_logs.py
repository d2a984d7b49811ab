"""Logging: what is logged of a failure that lasts, when, and where to."""

import logging
import re
import subprocess
import sys

import pytest

from consul_prom.logs import HOUR, MOST_FAILURES, MOST_LINES, REPEAT, ThrottledLogger, first_time
from tests.conftest import Clock
from tests.services.workers import PACKAGE

log = logging.getLogger(__name__)


@pytest.fixture
def sparing(clock: Clock, caplog: pytest.LogCaptureFixture) -> ThrottledLogger:
    caplog.set_level(logging.DEBUG)
    return ThrottledLogger(log, clock=clock)


def _said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_begins_lasts_and_ends(sparing: ThrottledLogger, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A failure is one WARNING, one more each ten minutes while it lasts, and one WARNING when it is over."""
    for _ in range(25):
        sparing.failed("%s is down", "it")
        clock.now += 60
    sparing.over("%s is up", "it")
    sparing.over("%s is up", "it")
    assert _said(caplog) == [("WARNING", "it is down")] * 3 + [("WARNING", "it is up")]


def test_nothing_to_end(sparing: ThrottledLogger, caplog: pytest.LogCaptureFixture) -> None:
    """Where no failure was said, it is not said that it is over."""
    sparing.over("it is up")
    assert _said(caplog) == []


def test_another_reason(sparing: ThrottledLogger, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Another reason is said at once; two that take turns are each said every ten minutes."""
    for _ in range(int(REPEAT / 10)):
        for reason in ("denied", "busy"):
            sparing.failed("it is down: %s", reason, reason=reason)
        clock.now += 10
    assert _said(caplog) == [("WARNING", "it is down: denied"), ("WARNING", "it is down: busy")]


def test_comes_and_goes(sparing: ThrottledLogger, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """What comes and goes all the time is a few lines an hour; and what was not said is not said to be over."""
    for _ in range(100):
        sparing.failed("down")
        sparing.over("up")
        clock.now += 1
    assert _said(caplog) == [("WARNING", "down"), ("WARNING", "up")] * (MOST_FAILURES // 2)
    clock.now += HOUR
    sparing.failed("down")
    assert _said(caplog)[MOST_FAILURES:] == [("WARNING", "down")]


def test_room_for_the_end(sparing: ThrottledLogger, caplog: pytest.LogCaptureFixture) -> None:
    """However many reasons a failure has, there is a line left to say that it is over."""
    for reason in range(100):
        sparing.failed("down: %d", reason, reason=reason)
    sparing.over("up")
    assert [level for level, _ in _said(caplog)] == ["WARNING"] * (MOST_FAILURES + 1)


def test_what_is_no_failure(sparing: ThrottledLogger, caplog: pytest.LogCaptureFixture) -> None:
    """What is told in a crowd is for those who look for it."""
    for _ in range(MOST_LINES + 1):
        sparing.tell("registered")
    assert _said(caplog) == [("INFO", "registered")] * MOST_LINES + [("DEBUG", "registered")]


def test_the_caller_is_named(sparing: ThrottledLogger, caplog: pytest.LogCaptureFixture) -> None:
    """A log that shows where a line comes from shows who said it."""
    sparing.failed("down")
    sparing.over("up")
    sparing.tell("registered")
    assert {record.funcName for record in caplog.records} == {"test_the_caller_is_named"}


TROUBLE = """
import logging
from consul_prom.logs import ThrottledLogger
{set_up}
sparing = ThrottledLogger(logging.getLogger("consul_prom.consul.registrar"))
sparing.failed("it is %s", "down")
sparing.over("it is up")
"""


def logged(set_up: str) -> list[str]:
    """The lines that a process writes to standard error, with the logging that *set_up* configures."""
    command = [sys.executable, "-W", "error", "-c", TROUBLE.format(set_up=set_up)]
    ended = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=60)
    assert not ended.stdout
    return ended.stderr.splitlines()


def test_nobody_configured_logging() -> None:
    """Without any configuration a line has time, process, level and logger, and the recovery is the last one."""
    down, up = logged("")
    head = r"\[20\d\d-\S+ \S+\] \[\d+\] \[WARNING\] consul_prom\.consul\.registrar: "
    assert re.fullmatch(f"{head}it is down", down)
    assert re.fullmatch(f"{head}it is up", up)


def handler(logger: str) -> str:
    """Source that gives a logger a handler with a format of its own."""
    return (
        "handler = logging.StreamHandler()\n"
        "handler.setFormatter(logging.Formatter('mine: %(message)s'))\n"
        f"logging.getLogger({logger!r}).addHandler(handler)"
    )


@pytest.mark.parametrize("logger", ["", "consul_prom", "consul_prom.consul.registrar", "gunicorn.error"])
def test_somebody_configured_logging(logger: str) -> None:
    """With a handler of the application's, or Gunicorn's, each line is logged once and in its format."""
    assert logged(handler(logger)) == ["mine: it is down", "mine: it is up"]


@pytest.mark.parametrize(
    "set_up",
    [
        "logging.getLogger('consul_prom').addHandler(logging.NullHandler())",
        f"{handler('gunicorn.error')}\nlogging.getLogger('gunicorn.error').setLevel('ERROR')",
    ],
    ids=["null handler", "Gunicorn's level"],
)
def test_silence(set_up: str) -> None:
    """A null handler silences our lines, and Gunicorn's level holds for them too."""
    assert logged(set_up) == []


def test_first_time() -> None:
    """A fact is new once."""
    assert [first_time("a"), first_time("b"), first_time("a")] == [True, True, False]
