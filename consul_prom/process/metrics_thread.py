"""The metrics thread: a daemon thread with its own event loop.

A blocked application is still scraped, and neither event loop slows the other.
"""

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import Any, Final

from consul_prom.errors import EndpointError
from consul_prom.process.fork import NOT_INHERITED

log = logging.getLogger(__name__)

START_DEADLINE: Final = 5.0


class MetricsThread:
    """A daemon thread with an event loop. Nothing that it runs can keep the process from ending."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: Future[None] = Future()
        NOT_INHERITED.add(self)

    def start(self) -> None:
        """Returns when the loop runs.

        Raises:
            EndpointError: the system gave no thread or no descriptors.
        """
        started: Future[asyncio.AbstractEventLoop] = Future()
        try:
            _start_thread(partial(_run_loop, started, self._ended))
            self._loop = started.result(timeout=START_DEADLINE)
        except (RuntimeError, OSError, TimeoutError) as error:
            raise EndpointError(f"the metrics thread cannot start: {str(error) or type(error).__name__}") from error

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run *coroutine* in the thread's loop."""
        if self._loop is None or self._loop.is_closed():
            coroutine.close()
            raise EndpointError("the metrics thread does not run")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        future.add_done_callback(_log_surprise)
        return future

    def descriptors(self) -> list[int]:
        """The sockets of the loop, and what it watches them with."""
        loop: Any = self._loop
        if loop is None or loop.is_closed():
            return []
        selector = loop._selector  # noqa: SLF001  # asyncio shows its descriptors in no other way
        own = [selector.fileno()] if hasattr(selector, "fileno") else []  # gevent's has none
        return [*selector.get_map(), loop._csock.fileno(), *own]  # noqa: SLF001

    def stop(self, timeout: float) -> bool:
        """Cancel all that runs, end the thread; False where that took longer than *timeout* seconds."""
        if self._loop is None:
            return True
        with suppress(RuntimeError):  # closed already
            self._loop.call_soon_threadsafe(self._loop.stop)
        return self._ended in wait([self._ended], timeout).done


def _log_surprise(future: Future[Any]) -> None:
    """What nobody expected must not vanish with a future that nobody asks."""
    if not future.cancelled() and (error := future.exception()):
        log.error("consul-prom did not expect this", exc_info=error)


def _start_thread(run: Callable[[], None]) -> None:
    """A daemon thread, and a true one: gevent makes threads greenlets, which stand still when the application does.

    In a process of gevent's, its hub and its resolver must be there before: made by two threads, they wait for each
    other.
    """
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey and monkey.is_module_patched("threading"):
        hub = sys.modules["gevent"].get_hub()
        _ = hub.resolver, hub.threadpool
        monkey.get_original("_thread", "start_new_thread")(run, ())
    else:
        threading.Thread(target=run, name="consul-prom", daemon=True).start()


def _run_loop(started: "Future[asyncio.AbstractEventLoop]", ended: "Future[None]") -> None:
    try:
        # Signals are the main thread's: one that is delivered here would not wake it from a system call.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        loop = asyncio.SelectorEventLoop()
    except OSError as error:
        started.set_exception(error)
        return
    asyncio.set_event_loop(loop)
    loop.call_soon(started.set_result, loop)
    try:
        loop.run_forever()
        loop.run_until_complete(_end(asyncio.all_tasks(loop)))
    finally:
        loop.close()
        ended.set_result(None)


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel *tasks*, after a moment for those that were closing something."""
    for patience in (0.2, 1):
        tasks = (await asyncio.wait(tasks, timeout=patience))[1] if tasks else tasks
        for task in tasks:
            task.cancel()
