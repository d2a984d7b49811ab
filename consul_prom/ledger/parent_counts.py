"""Leave the counts of a parent process out of the ledgers of its forked children.

A fork copies all values. The child notes what they hold when it counts for the first time, or when a worker starts in
it. Until then they hold what they held at the fork, so the fork itself looks at no series.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import wraps
from typing import Any, Final
from weakref import WeakSet

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Metric, Summary

from consul_prom.ledger.values import PARENTS, MappedValue, MutexValue, copy_copies, note_parent, plain


class _Fork:
    """The last fork that led to this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._registries: WeakSet[CollectorRegistry] = WeakSet([REGISTRY])
        self._noted = True
        self._at = 0.0
        self._copied: set[Any] = set()
        self._intercepted: list[tuple[type, str, Any]] = []

    def in_child(self) -> None:
        self._lock = threading.RLock()  # its owner may be a thread that is gone
        self._noted, self._at, self._copied = False, time.time(), set()
        PARENTS.clear()
        copy_copies()
        if not self._intercepted:
            self._intercepted = [
                (kind, name, vars(kind)[name])
                for kind in (MappedValue, MutexValue)
                for name in ("inc", "set")
                if name in vars(kind)
            ]
            for kind, name, method in self._intercepted:
                setattr(kind, name, self._first(method))

    def copied(self, collectors: Iterable[Any]) -> None:
        """Skip *collectors*: their values were in the parent's ledger, and `MappedValue` notes what they held."""
        self._copied.update(collectors)

    def watch(self, registry: CollectorRegistry) -> None:
        """Include *registry* from now on. If it is new here, what metrics from before the fork hold is the parent's."""
        if registry not in self._registries:
            self._registries.add(registry)
            with suppress(AttributeError):  # as in `note`
                for child in _series([registry], set()):
                    if child._created < self._at:
                        for value in plain(child):
                            note_parent(value)

    def note(self) -> None:
        """Note what the parent has counted, unless that is done."""
        with self._lock:
            if not self._noted:
                self._note()

    def _note(self) -> None:
        try:
            for child in _series(self._registries, self._copied):
                for value in plain(child):
                    if self._noted:  # a signal handler has counted meanwhile
                        return
                    note_parent(value)
        except AttributeError:
            pass  # a version of the library that we do not know: then there will be no ledger, which says so
        finally:
            self._noted, self._copied = True, set()
            while self._intercepted:
                kind, name, method = self._intercepted.pop()
                setattr(kind, name, method)

    def _first(self, method: Callable[..., None]) -> Callable[..., None]:
        """Return *method* for use until the first count."""

        @wraps(method)
        def count(*arguments: Any, **options: Any) -> None:
            self.note()
            method(*arguments, **options)

        return count


def counted(registry: CollectorRegistry) -> Iterator[Metric]:
    """Yield the counters, summaries and histograms of *registry* that this process has used."""
    for collector in _collectors(registry):
        if any(value.get() for child in _children(collector) for value in plain(child)):
            yield from collector.collect()


def _series(registries: Iterable[CollectorRegistry], but: set[Any]) -> Iterator[Any]:
    for registry in list(registries):
        for collector in _collectors(registry):
            if collector not in but:
                yield from _children(collector)


def _collectors(registry: CollectorRegistry) -> list[Any]:
    return [one for one in registry._collector_to_names if isinstance(one, Counter | Summary | Histogram)]


def _children(metric: Any) -> list[Any]:
    return list(metric._metrics.values()) if metric._labelnames else [metric]


FORK: Final = _Fork()

os.register_at_fork(after_in_child=FORK.in_child)
