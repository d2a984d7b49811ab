"""A process that is killed anywhere: at each line of ours in take-over, births, growth, removal and reset.

What stands between two lines of Python is a call of the system at most, so this stops before and after each of them.
"""

import itertools
import mmap
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from consul_prom.errors import LedgerError
from consul_prom.ledger import file as ledger_file
from consul_prom.ledger import registry as ledger_registry
from consul_prom.ledger import values as ledger_values
from consul_prom.ledger.file import Ledger
from consul_prom.ledger.registry import LedgerRegistry

OURS: Final = {module.__file__ for module in (ledger_values, ledger_registry, ledger_file)}
KILLED: Final = 9
WHOLE: Final = 0
SERIES: Final = ("old", "kept", "reborn", "new", "early", "reset")
BASE: Final = {"old": 10, "kept": 20, "reborn": 30, "reset": 40}
TRIED, DONE, SHOWN = range(3)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping of a size that is copied quickly."""
    monkeypatch.setattr(ledger_file, "SIZE", 2**19)


class Tally:
    """What a process tried and did, in memory that outlives it: for each series, three numbers."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4096)
        self.numbers = memoryview(self.memory).cast("q")

    def of(self, series: str, what: int) -> int:
        return int(self.numbers[3 * SERIES.index(series) + what])

    def put(self, series: str, what: int, number: int) -> None:
        self.numbers[3 * SERIES.index(series) + what] = number

    def clear(self) -> None:
        self.memory[:] = bytes(4096)


class Shop:
    """A worker's metrics in a ledger; each increment is noted before and after."""

    def __init__(self, path: Path, tally: Tally | None = None) -> None:
        self.tally = tally or Tally()
        self.registry = CollectorRegistry()
        self.hits = Counter("hits", "-", ["x"], registry=self.registry)
        self.plain = Counter("reset", "-", registry=self.registry)
        if tally:
            self.inc("early", 3)
            self.inc("old", 4)
        self.continued = LedgerRegistry(
            self.registry, Ledger.take_over(path, boot="b", instance="web-1:0", now=1_000_000)
        )

    def inc(self, series: str, amount: int) -> None:
        metric = self.plain if series == "reset" else self.hits.labels(series)
        self.tally.put(series, TRIED, self.tally.of(series, TRIED) + amount)
        metric.inc(amount)
        self.tally.put(series, DONE, self.tally.of(series, DONE) + amount)

    def page(self) -> dict[str, int]:
        found = {}
        for family in self.continued.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    found[sample.labels.get("x", "reset")] = int(sample.value)
        return found

    def scrape(self) -> None:
        for series, value in self.page().items():
            self.tally.put(series, SHOWN, value)


def _page(path: Path) -> dict[str, int]:
    """What the next worker shows. It is closed, or each fork after it would copy one mapping more."""
    shop = Shop(path)
    try:
        return shop.page()
    finally:
        shop.continued.close()


def prepare(path: Path) -> None:
    """The ledger of a worker before, which was killed."""
    shop = Shop(path)
    for series, count in BASE.items():
        shop.inc(series, count)


def live(begin: Callable[[], Shop]) -> None:
    """A worker's whole life."""
    shop = begin()
    shop.scrape()
    shop.inc("old", 1)
    shop.inc("new", 1)
    shop.scrape()
    shop.inc("kept", 5)
    Histogram("late", "-", ["x"], registry=shop.registry, buckets=(1, 2)).labels("a").observe(1)
    shop.inc("new", 1)
    shop.scrape()
    shop.continued.close()


def test_killed_anywhere(tmp_path: Path) -> None:
    """The next worker continues with all that was counted: no less than was shown or done, no more than was tried."""
    tally, points = _points(tmp_path, live, lambda path, tally: lambda: Shop(path, tally))
    for _ in points:
        page = _page(tmp_path / "ledger")
        for series in SERIES:
            base, value = BASE.get(series, 0), page.get(series, 0)
            early = 4 * (series == "old") + 3 * (series == "early")  # counted before the ledger was opened
            assert base + tally.of(series, DONE) - early <= value <= base + tally.of(series, TRIED), series
            assert value >= tally.of(series, SHOWN), series
        assert page["kept"] >= BASE["kept"]
    assert page["old"] == 15
    assert page["early"] == 3


def test_killed_in_growth(tmp_path: Path) -> None:
    """So it is where the file grows."""

    def grow(shop: Shop) -> None:
        end = shop.continued._ledger._allocated - shop.continued._ledger._end
        shop.continued._ledger._write(b"\0" * (end - 64))
        shop.continued._ledger._end -= end - 64
        shop.continued._ledger._allocated = shop.continued._ledger._end
        shop.inc("new", 2)
        shop.inc("old", 1)
        shop.scrape()

    tally, points = _points(tmp_path, grow, Shop)
    for _ in points:
        page = _page(tmp_path / "ledger")
        for series in ("old", "new", "kept"):
            early = 4 * (series == "old")
            base = BASE.get(series, 0)
            assert base + tally.of(series, DONE) - early <= page.get(series, 0) <= base + tally.of(series, TRIED)
            assert page.get(series, 0) >= tally.of(series, SHOWN)


def test_killed_in_removal(tmp_path: Path) -> None:
    """A removal, a rebirth, a reset is done or not: never half of it, never both values."""

    def remove(shop: Shop) -> None:
        shop.hits.remove("reborn")
        shop.hits.labels("reborn").inc(1)
        shop.hits.remove("reborn")
        shop.plain.reset()
        shop.plain.inc(2)

    _, points = _points(tmp_path, remove, Shop)
    seen = set()
    for _ in points:
        page = _page(tmp_path / "ledger")
        seen.add((page.get("reborn"), page["reset"]))
    assert seen == {(30, 40), (None, 40), (0, 40), (1, 40), (None, 0), (None, 2)}


@pytest.mark.parametrize("error", [28, 5, 30], ids=["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize("lasts", [False, True])
def test_every_call_fails(tmp_path: Path, error: int, monkeypatch: pytest.MonkeyPatch, *, lasts: bool) -> None:
    """Whichever call of the system fails, a take-over goes on with all counts, or with none if none can be read."""
    path, kept = tmp_path / "ledger", tmp_path / "kept"
    prepare(kept)
    outcomes = set()
    number = 0
    while True:
        shutil.copy(kept, path)
        failing = _Failing(number, error, lasts=lasts)
        with monkeypatch.context() as patch:
            patch.setattr(ledger_file, "os", failing)
            try:
                Ledger.take_over(path, boot="b", instance="web-1:0", now=1_000_000)
                outcomes.add("whole")
            except LedgerError:
                outcomes.add("none")
                assert not path.exists()
        rest = Shop(path).page()
        assert all(rest.get(series, 0) in {0, count} for series, count in BASE.items())
        assert rest.get("old", 0) == 0 or [rest[series] for series in BASE] == list(BASE.values())
        if failing.calls <= number:
            break
        number += 1
    assert outcomes == ({"whole", "none"} if lasts else {"whole"})
    assert number >= 6


class _Failing:
    """The module os, of which the call of that number fails, or all from there on; not so those that clean up."""

    def __init__(self, number: int, error: int, *, lasts: bool) -> None:
        self.calls = 0
        self._lasts = lasts
        self._number = number
        self._error = error

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in {"open", "fstat", "ftruncate", "posix_fallocate", "pwrite", "replace"}:
            return real

        def call(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == self._number + 1 or (self._lasts and self.calls > self._number):
                raise OSError(self._error, os.strerror(self._error))
            return real(*arguments)

        return call


def _points(tmp_path: Path, act: Callable[[Any], None], begin: Callable[[Path, Tally], Any]) -> tuple[Tally, Any]:
    """The ledger of a process that is killed before a line of ours that *act* runs on what *begin* gives.

    For each line before which something that outlives the process has changed; at last it is not killed.
    """
    path, kept, tally = tmp_path / "ledger", tmp_path / "kept", Tally()
    prepare(kept)

    def state() -> tuple[object, ...]:
        return tally.memory[:], *((file.name, _begin(file)) for file in sorted(tmp_path.iterdir()))

    def points() -> Any:
        for changes in itertools.count(1):
            shutil.copy(kept, path)
            tally.clear()
            outcome = _outcome(partial(_run, act, lambda: begin(path, tally), _Death(state, changes)))
            yield changes
            if outcome == WHOLE:
                return
            assert outcome == KILLED

    return tally, points()


def _begin(file: Path) -> bytes:
    """What is written of a ledger; the rest of the mapping is a hole."""
    with file.open("rb") as content:
        return content.read(2**17)


class _Death:
    """Comes when the *state* has changed so many times."""

    def __init__(self, state: Callable[[], object], changes: int) -> None:
        self._state = state
        self._changes = changes
        self._last: object = None

    def __call__(self) -> None:
        before, self._last = self._last, self._state()
        self._changes -= self._last != before
        if not self._changes:
            os._exit(KILLED)


def _run(act: Callable[[Any], None], begin: Callable[[], Any], before: Callable[[], None]) -> None:
    """*act* on what *begin* gives; *before* is called when a line of ours is about to run."""

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename not in OURS:
            return None
        if event == "line":
            before()
        return trace

    begun = begin()
    sys.settrace(trace)
    act(begun)
    sys.settrace(None)


def _outcome(run: Callable[[], None]) -> int:
    """How a child that runs this ends."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            run()
            code = WHOLE
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
