"""A value of prometheus_client's that lives in a cell of a mapped file; where there is none, in memory as before."""

import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from math import isfinite
from operator import getitem, is_not, itemgetter
from typing import Any, Final
from weakref import WeakKeyDictionary

from prometheus_client import Counter, Histogram, Summary, values


class _Asked(threading.local):
    totals = False


_ASKED: Final = _Asked()
_OWN_CLASSES: Final = {Counter, Summary, Histogram}
MutexValue: Final[Any] = getattr(values, "MutexValue", object)
"""A value of the library's, in memory; where it knows no such class, none is one."""
PARENTS: Final[WeakKeyDictionary[Any, float]] = WeakKeyDictionary()
"""Of values that are the library's, what the process that forked us counts."""
_COPIES: Final[list[tuple[Any, Any]]] = []
"""In a forked child, by the order of the forks: cells of its parent's, which are released, and its copy of them."""


@contextmanager
def totals() -> Iterator[None]:
    """Meanwhile values give this thread their totals, so that the library's own code renders those."""
    _ASKED.totals = True
    try:
        yield
    finally:
        _ASKED.totals = False


class MappedValue:
    """Does what prometheus_client's MutexValue does.

    The cell holds the slot's total; `_base` of it this process did not count. `_elsewhere` stands in a ledger already,
    or is counted by the process that forked us: a ledger that the value moves into leaves it out.

    In a forked child the parent's cells are released, so that their use raises ValueError. The value then moves to the
    child's copy of them. So neither a count nor a fork pays for this: 20,000 histograms took a fork a second.

    A total that is not finite ends with its process. The slot's next worker and a forked child start it at 0, because
    nothing can be added to it or subtracted from it.
    """

    __slots__ = ("_base", "_cells", "_created", "_elsewhere", "_exemplar", "_index", "_lock")
    _multiprocess = False

    def __init__(self, lock: threading.Lock, cells: Any, index: int, created: int) -> None:
        """A new one, on top of what the cell *index* holds; the cell *created* is the series' birthday."""
        self._cells = cells
        self._index = index
        self._created = created
        self._base: float = cells[index]
        self._elsewhere = 0.0
        self._exemplar: Any = None
        self._lock = lock

    def inc(self, amount: float) -> None:
        with self._lock:
            try:
                self._cells[self._index] += amount
            except ValueError:
                self._find_copy()
                self._cells[self._index] += amount

    def set(self, value: float, timestamp: float | None = None) -> None:  # noqa: ARG002  # as in prometheus_client
        """Start anew, as `Counter.reset` does."""
        with self._lock:
            self._held()
            self._cells[self._index] = value
            self._cells[self._created] = time.time()
            self._base = self._elsewhere = 0.0

    def get(self) -> float:
        """What this process counted."""
        with self._lock:
            total = self._held()
            return total if _ASKED.totals else total - self._base

    def total(self) -> float:
        """What the slot's workers counted, this one and those before it: what a page shows."""
        with self._lock:
            return self._held()

    def set_exemplar(self, exemplar: Any) -> None:
        with self._lock:
            self._exemplar = exemplar

    def get_exemplar(self) -> Any:
        with self._lock:
            return self._exemplar

    def enter(self, cells: "memoryview[float]", *, index: int, created: int) -> None:
        """Live in the cell *index* from now on, on top of what it holds."""
        with self._lock:
            counted = self._held()
            own = counted - self._base
            cells[index] += counted - self._elsewhere if isfinite(counted) else counted
            self._base = cells[index] - own if isfinite(counted) else 0.0
            self._cells, self._index, self._created = cells, index, created
            self._elsewhere = 0.0

    def leave(self, *, stays: bool) -> None:
        """Live in memory from now on; whether what was counted *stays* elsewhere."""
        with self._lock:
            total = self._held()
            self._cells, self._index, self._created = array("d", (total, 0.0)), 0, 1
            self._elsewhere = total if stays else 0.0

    def note_parent(self) -> None:
        """In a forked child, before its first count, note what the parent counted in memory."""
        if type(self._cells) is array:
            self._start_on_parents()

    def _held(self) -> float:
        try:
            return self._cells[self._index]  # type: ignore[no-any-return]
        except ValueError:
            self._find_copy()
            return self._cells[self._index]  # type: ignore[no-any-return]

    def _find_copy(self) -> None:
        """Leave the parent's cells, if that is where the value is."""
        before = self._cells
        for parents, copy in _COPIES:
            if self._cells is parents:
                self._cells = copy
        if self._cells is not before:
            self._start_on_parents()

    def _start_on_parents(self) -> None:
        if not isfinite(self._cells[self._index]):
            self._cells[self._index] = self._base = 0.0
        self._elsewhere = self._cells[self._index]


def copy_cells(cells: "memoryview[float]", number: int) -> None:
    """In a forked child, copy the first *number* of its parent's *cells*. A value moves to the copy when it is used."""
    with cells[:number] as used:
        copy = memoryview(bytearray(used)).cast("d")
    _COPIES.append((cells, copy))
    cells.release()


def copy_copies() -> None:
    """In a child of a forked child, do the same with the copies that the parent has."""
    released = {id(cells) for cells, _ in _COPIES}
    for copy in [copy for _, copy in _COPIES if id(copy) not in released]:
        copy_cells(copy, len(copy))


def reader(found: Sequence[MappedValue]) -> Callable[[], Sequence[float]]:
    """How to read the totals of *found*, in one step, for as long as none of them moves; meanwhile none may."""
    cells = [value._cells for value in found]
    indexes = [value._index for value in found]
    if len(found) == 1 or any(map(is_not, cells, repeat(cells[0]))):
        return lambda: list(map(getitem, cells, indexes))
    return partial(itemgetter(*indexes), cells[0])


class _Replaced(MutexValue):  # type: ignore[misc]  # the library may have none
    """What a value was before: who still holds it, or is inside of its `inc`, lands in the cell."""

    _successor: MappedValue

    @property
    def _value(self) -> float:
        successor = self._successor
        return successor._held() - successor._base

    @_value.setter
    def _value(self, own: float) -> None:
        successor = self._successor
        successor._held()  # so that it is in cells of this process
        successor._cells[successor._index] = own + successor._base


def move(metric: Any, cells: "memoryview[float]", created: int, first: int, *, newborn: bool) -> None:
    """Let one series live in the cells from *first* on, and *created* for its birthday.

    Of a *newborn* of the library's own classes nobody holds a value, and none has counted.
    """
    metric._created = cells[created]
    old = plain(metric)
    held = cells[first : first + len(old)]
    if not isfinite(sum(held)):
        held[:] = array("d", [number if isfinite(number) else 0.0 for number in held])
    if newborn and type(metric) in _OWN_CLASSES:
        moved = [MappedValue(value._lock, cells, index, created) for index, value in enumerate(old, first)]
    else:
        moved = [_replace(value) for value in old]
        for index, value in enumerate(moved, first):
            value.enter(cells, index=index, created=created)
    if isinstance(metric, Counter):
        metric._value = moved[0]
    elif isinstance(metric, Summary):
        metric._count, metric._sum = moved
    else:
        metric._sum, *metric._buckets = moved


def plain(metric: Any) -> list[Any]:
    """The values of one series as they are, in the ledger's order."""
    if isinstance(metric, Counter):
        return [metric._value]
    if isinstance(metric, Summary):
        return [metric._count, metric._sum]
    return [metric._sum, *metric._buckets]


def note_parent(value: Any) -> None:
    """In a forked child, note that the parent counted what *value* holds."""
    if isinstance(value, MappedValue):
        value.note_parent()
    elif type(value) is MutexValue and value._value:
        PARENTS[value] = value._value


def _replace(value: Any) -> MappedValue:
    if isinstance(value, MappedValue):
        return value
    with value._lock:
        parents = PARENTS.pop(value, 0.0)
        successor = MappedValue(value._lock, array("d", (0.0, 0.0)), 0, 1)
        successor._cells[0] = value._value if isfinite(parents) else 0.0
        successor._elsewhere = parents if isfinite(parents) else 0.0
        successor._exemplar = value._exemplar
        value._successor = successor
        value.__class__ = _Replaced
    return successor
