"""The metrics thread: its start, its end, and what a fork makes of it."""

import asyncio
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from consul_prom.errors import EndpointError
from consul_prom.process import metrics_thread as module
from consul_prom.process.metrics_thread import MetricsThread
from tests import ROOT
from tests.services.waiting import wait_until

DEADLINE = 10.0


@pytest.fixture
def thread() -> Iterator[MetricsThread]:
    thread = MetricsThread()
    thread.start()
    yield thread
    thread.stop(DEADLINE)


async def _nothing() -> None:
    pass


class TestThread:
    """The daemon thread with a loop of its own."""

    def test_runs_coroutines(self, thread: MetricsThread) -> None:
        """What is spawned runs in a daemon thread that a stack dump shows by name."""

        async def where() -> threading.Thread:
            return threading.current_thread()

        found = thread.spawn(where()).result(DEADLINE)
        assert found is not threading.current_thread()
        assert found.daemon
        assert found.name == "consul-prom"

    def test_leaves_signals_to_the_main_thread(self, thread: MetricsThread) -> None:
        """No signal is delivered to it, or the main thread would sleep on."""

        async def blocked() -> set[Any]:
            return signal.pthread_sigmask(signal.SIG_BLOCK, [])

        assert thread.spawn(blocked()).result(DEADLINE) >= {
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGHUP,
            signal.SIGUSR1,
        }

    def test_exception_reaches_the_caller(self, thread: MetricsThread) -> None:
        """An exception of a coroutine is its future's, and the thread goes on."""

        async def fail() -> None:
            raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            thread.spawn(fail()).result(DEADLINE)
        thread.spawn(_nothing()).result(DEADLINE)

    def test_no_thread_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A system that gives no thread is an exception in the caller, and there is nothing to stop."""

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        thread = MetricsThread()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(EndpointError, match="the metrics thread cannot start: can't start new thread"):
                thread.start()
        assert thread.stop(0.1)
        with pytest.raises(EndpointError, match="does not run"):
            thread.spawn(_nothing())

    def test_no_descriptors_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A system that gives no descriptors for a loop is an exception in the caller."""

        def refuse() -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(asyncio, "SelectorEventLoop", refuse)
        with pytest.raises(EndpointError, match=r"cannot start: .*Too many open files"):
            MetricsThread().start()

    def test_loop_that_does_not_come_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A thread that hangs before its loop runs is an exception after the deadline, never a hang."""
        release, loop = threading.Event(), asyncio.SelectorEventLoop()

        def hang() -> asyncio.SelectorEventLoop:
            release.wait(DEADLINE)
            return loop

        monkeypatch.setattr(module, "START_DEADLINE", 0.1)
        monkeypatch.setattr(asyncio, "SelectorEventLoop", hang)
        thread = MetricsThread()
        with pytest.raises(EndpointError, match="the metrics thread cannot start: TimeoutError"):
            thread.start()
        loop.call_soon_threadsafe(loop.stop)
        release.set()
        wait_until(loop.is_closed, within=DEADLINE, what="the late thread has ended")

    def test_not_started(self) -> None:
        """What is spawned before the start is refused, and its coroutine closed."""
        coroutine = _nothing()
        with pytest.raises(EndpointError, match="the metrics thread does not run"):
            MetricsThread().spawn(coroutine)
        with pytest.raises(RuntimeError, match="cannot reuse"):
            coroutine.send(None)
        assert MetricsThread().stop(0.1)

    def test_stopped(self) -> None:
        """After the stop nothing can be spawned, and a second stop does nothing."""
        thread = MetricsThread()
        thread.start()
        assert thread.stop(DEADLINE)
        assert thread.stop(DEADLINE)
        with pytest.raises(EndpointError, match="does not run"):
            thread.spawn(_nothing())

    def test_stop_cancels_what_runs(self, thread: MetricsThread) -> None:
        """A task that would run for ever is cancelled, and its clean-up runs to the end."""
        cleaned = threading.Event()

        async def run() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0.01)
                cleaned.set()

        future = thread.spawn(run())
        thread.spawn(_nothing()).result(DEADLINE)
        assert thread.stop(DEADLINE)
        assert cleaned.is_set()
        assert future.cancelled()

    def test_stop_lets_a_closing_task_end(self, thread: MetricsThread) -> None:
        """A task that is about to end is not cancelled."""

        async def close() -> str:
            await asyncio.sleep(0.05)
            return "closed"

        future = thread.spawn(close())
        assert thread.stop(DEADLINE)
        assert future.result(0) == "closed"

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_stop_does_not_wait_for_a_task_that_will_not_end(self, thread: MetricsThread) -> None:
        """A task that refuses to be cancelled delays the stop by a moment, and the thread ends."""

        async def refuse() -> None:
            while True:
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(3600)

        thread.spawn(refuse())
        begun = time.monotonic()
        assert thread.stop(DEADLINE)
        assert time.monotonic() - begun < DEADLINE / 2
        gc.collect()

    def test_stop_has_a_deadline(self, thread: MetricsThread) -> None:
        """A task that blocks the loop cannot delay the caller beyond the deadline, which is told."""
        release, blocking = threading.Event(), threading.Event()

        async def block() -> None:
            blocking.set()
            release.wait(DEADLINE)

        thread.spawn(block())
        assert blocking.wait(DEADLINE)
        begun = time.monotonic()
        assert not thread.stop(0.1)
        assert time.monotonic() - begun < 5
        release.set()
        assert thread.stop(DEADLINE)

    def test_process_does_not_wait_for_it(self) -> None:
        """A process that never stops its thread ends all the same."""
        code = """
import asyncio
from consul_prom.process.metrics_thread import MetricsThread
thread = MetricsThread()
thread.start()
thread.spawn(asyncio.sleep(3600))
"""
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, timeout=DEADLINE, check=True, capture_output=True
        )
        assert done.stderr == b""

    def test_child_of_gevent(self) -> None:
        """Where gevent has patched the selectors, a forked child has none of the loop's sockets either."""
        code = """
from gevent import monkey
monkey.patch_all()
import os
from consul_prom.process.metrics_thread import MetricsThread
thread = MetricsThread()
thread.start()
descriptors = thread.descriptors()
assert len(descriptors) == 2, "a pair, with which it wakes itself"
child = os.fork()
if not child:
    os._exit({os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in descriptors} != {"/dev/null"})
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert thread.stop(10)
"""
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, timeout=DEADLINE, check=False, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
