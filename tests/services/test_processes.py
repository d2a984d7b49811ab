"""The processes that tests start can be interrupted, and end with their test."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.services import processes

SLEEP = [sys.executable, "-c", "import signal; print('ready', flush=True); signal.pause()"]
NESTED = [sys.executable, "-c", f"import subprocess, sys; subprocess.Popen({SLEEP!r}); sys.exit()"]


def started(command: list[str]) -> subprocess.Popen[str]:
    """A process that has begun, or whose child has."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(scope="module")
def program() -> Iterator[subprocess.Popen[str]]:
    """A program of a wider fixture."""
    with started(SLEEP) as process:
        yield process
        process.kill()


def test_left(program: subprocess.Popen[str]) -> None:
    """A process that a test left is killed; a wider fixture's is not."""
    with started(SLEEP) as left:
        processes.end()
        assert left.wait(60) == -signal.SIGKILL
    assert program.poll() is None


def test_left_by_another() -> None:
    """A process is killed even if its parent has ended."""
    with started(NESTED) as parent:
        parent.wait(60)
        processes.end()
        assert parent.stdout
        assert parent.stdout.read() == ""  # its child had the other end


def test_mark_of_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test run that a test starts kills neither itself nor other processes of that test."""
    monkeypatch.setenv(processes.MARK, "1 a test")
    with started(SLEEP) as other:
        processes.end()
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("number", processes.HANDLERS, ids=lambda number: number.name)
def test_interruptible(number: signal.Signals) -> None:
    """A program can be ended by a signal even if what started the tests ignores it."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        processes.prepare()
        with started(SLEEP) as process:
            process.send_signal(number)
            assert process.wait(60) == -number
    finally:
        signal.signal(number, before)
