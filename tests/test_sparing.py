"""A log of failures that last: what is said, and when."""

import logging

import pytest

from consul_prom.sparing import HOUR, MOST_FAILURES, MOST_LINES, REPEAT, SparingLog
from tests.conftest import Clock

log = logging.getLogger(__name__)


@pytest.fixture
def sparing(clock: Clock, caplog: pytest.LogCaptureFixture) -> SparingLog:
    caplog.set_level(logging.DEBUG)
    return SparingLog(log, clock=clock)


def _said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_begins_lasts_and_ends(sparing: SparingLog, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A failure is one WARNING, one more each ten minutes while it lasts, and one INFO when it is over."""
    for _ in range(25):
        sparing.failed("%s is down", "it")
        clock.now += 60
    sparing.over("%s is up", "it")
    sparing.over("%s is up", "it")
    assert _said(caplog) == [("WARNING", "it is down")] * 3 + [("INFO", "it is up")]


def test_nothing_to_end(sparing: SparingLog, caplog: pytest.LogCaptureFixture) -> None:
    """Where no failure was said, it is not said that it is over."""
    sparing.over("it is up")
    assert _said(caplog) == []


def test_another_reason(sparing: SparingLog, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Another reason is said at once; two that take turns are each said every ten minutes."""
    for _ in range(int(REPEAT / 10)):
        for reason in ("denied", "busy"):
            sparing.failed("it is down: %s", reason, reason=reason)
        clock.now += 10
    assert _said(caplog) == [("WARNING", "it is down: denied"), ("WARNING", "it is down: busy")]


def test_comes_and_goes(sparing: SparingLog, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """What comes and goes all the time is a few lines an hour; and what was not said is not said to be over."""
    for _ in range(100):
        sparing.failed("down")
        sparing.over("up")
        clock.now += 1
    assert _said(caplog) == [("WARNING", "down"), ("INFO", "up")] * (MOST_FAILURES // 2)
    clock.now += HOUR
    sparing.failed("down")
    assert _said(caplog)[MOST_FAILURES:] == [("WARNING", "down")]


def test_room_for_the_end(sparing: SparingLog, caplog: pytest.LogCaptureFixture) -> None:
    """However many reasons a failure has, there is a line left to say that it is over."""
    for reason in range(100):
        sparing.failed("down: %d", reason, reason=reason)
    sparing.over("up")
    assert [level for level, _ in _said(caplog)] == ["WARNING"] * MOST_FAILURES + ["INFO"]


def test_what_is_no_failure(sparing: SparingLog, caplog: pytest.LogCaptureFixture) -> None:
    """What is told in a crowd is for those who look for it."""
    for _ in range(MOST_LINES + 1):
        sparing.tell("registered")
    assert _said(caplog) == [("INFO", "registered")] * MOST_LINES + [("DEBUG", "registered")]


def test_the_caller_is_named(sparing: SparingLog, caplog: pytest.LogCaptureFixture) -> None:
    """A log that shows where a line comes from shows who said it."""
    sparing.failed("down")
    sparing.over("up")
    sparing.tell("registered")
    assert {record.funcName for record in caplog.records} == {"test_the_caller_is_named"}
