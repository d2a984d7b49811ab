"""An end that waits for a scrape."""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from consul_prom.process.signals import Signals
from consul_prom.worker.drain import await_scrape


class TestSignals:
    """Whether a signal told the process to end."""

    @pytest.fixture(autouse=True)
    def _handlers_are_as_before(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    def test_comes(self) -> None:
        """The handler that there is goes on to handle it."""
        handled: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _frame: handled.append(number))
        signals = Signals()
        signals.watch()
        assert not signals.came
        signal.raise_signal(signal.SIGTERM)
        assert (signals.came, handled) == (True, [signal.SIGTERM])

    def test_raises(self) -> None:
        """What the handler raises passes through, as KeyboardInterrupt does."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signals = Signals()
        signals.watch()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.came

    def test_default_stays(self) -> None:
        """A signal that ends the process at once still does."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
        Signals().watch()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN

    def test_close(self) -> None:
        """Handlers are put back, but for one that was changed meanwhile."""

        def theirs(*_: Any) -> None: ...
        def other(*_: Any) -> None: ...

        signal.signal(signal.SIGTERM, theirs)
        signal.signal(signal.SIGINT, theirs)
        signals = Signals()
        signals.watch()
        signal.signal(signal.SIGINT, other)
        signals.close()
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == (theirs, other)

    def test_other_thread(self) -> None:
        """In another thread nothing is done."""
        before, signals = signal.getsignal(signal.SIGINT), Signals()
        for act in (signals.watch, signals.close):
            thread = threading.Thread(target=act)
            thread.start()
            thread.join()
        assert signal.getsignal(signal.SIGINT) is before


class TestWait:
    """The wait for a scrape."""

    def test_scraped(self) -> None:
        """It ends with a scrape after its begin."""
        asked: list[float] = []

        def scraped_since(when: float) -> bool:
            asked.append(when)
            return len(asked) == 3

        await_scrape(scraped_since, goes_on=lambda: True, timeout=60, told=True)
        assert len(set(asked)) == 1

    def test_repeated_signal(self) -> None:
        """Another SIGTERM does not end it, and is handled again afterwards."""
        before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:

            def told_again(_when: float) -> bool:
                signal.raise_signal(signal.SIGTERM)
                return True

            await_scrape(told_again, goes_on=lambda: True, timeout=60, told=True)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_first_signal(self) -> None:
        """A process that ends of itself hears the first one."""
        heard: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
        try:

            def told(_when: float) -> bool:
                signal.raise_signal(signal.SIGTERM)
                return True

            await_scrape(told, goes_on=lambda: True, timeout=60, told=False)
            assert heard == [signal.SIGTERM]
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_other_thread(self) -> None:
        """In another thread nothing is done to signals."""
        with ThreadPoolExecutor() as pool:
            pool.submit(await_scrape, lambda _when: True, goes_on=lambda: True, timeout=60, told=True).result(10)

    def test_time_is_over(self) -> None:
        """It ends with its time."""
        await_scrape(lambda _when: False, goes_on=lambda: True, timeout=0.1, told=True)

    def test_nobody_will_come(self) -> None:
        """It ends when there is nothing to wait for."""
        goes_on = iter([True, True, False])
        await_scrape(lambda _when: False, goes_on=lambda: next(goes_on), timeout=60, told=True)
        assert next(goes_on, None) is None
