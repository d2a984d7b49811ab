"""The processes that tests start: they can be interrupted, and end with their test even if it fails.

A variable in their environment names the test that started them.
"""

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MARK: Final = "TEST_THAT_STARTED_THIS"
OWN: Final = f"{os.getpid()}"
DESCRIPTORS: Final = 4096
"""Tests hold a thousand connections; a user's limit is often 1024."""
HANDLERS: Final = {
    signal.SIGHUP: lambda *_: None,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGQUIT: lambda *_: None,
}
"""A program starts with the default in place of a handler."""


def prepare() -> None:
    """Prepare this process for tests that start others.

    `nohup`, and `&` in a shell without job control, make a process ignore signals, and its programs inherit that.
    """
    os.environ[MARK] = OWN
    for number, handler in HANDLERS.items():
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def marked(test: str) -> Iterator[None]:
    """Mark the processes that start meanwhile, and their children; programs of wider fixtures have started before."""
    os.environ[MARK] = f"{OWN} {test}"
    try:
        yield
    finally:
        os.environ[MARK] = OWN


def end() -> None:
    """Kill the processes that have the present mark or a longer one, and those that this process forked.

    A process that is not prepared does nothing: its mark is that of the test that started it, as in a nested run.
    """
    mark = os.environ.get(MARK, "")
    if mark.split(" ")[0] != OWN:
        return
    wanted = f"{MARK}={mark} "
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            found = [entry for entry in _environment(process) if entry.startswith(f"{MARK}=")]
            forked = not found and _parent(process) == os.getpid()  # which shows this process's own environment
            if forked or (found and f"{found[0]} ".startswith(wanted)):
                os.kill(int(process.name), signal.SIGKILL)


def _environment(process: Path) -> list[str]:
    return (process / "environ").read_text(errors="replace").split("\0")


def _parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])
