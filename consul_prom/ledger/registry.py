"""A registry that is continued from a ledger: its counters, histograms and summaries live in the ledger's cells.

Its page shows a slot's totals, and the series that its earlier workers left. `get()` and the registry itself go on to
show what this process counted. Gauges, Info and Enum are left alone, and so are custom collectors.

A renderer of its own needs, instead of `LedgerRegistry.collect`: `collectors`, the `total()` of a value, the
`_created` of a metric, which is carried with the value, `inherited`, and `families` for what it does not know.
"""

import logging
import os
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any, Final
from weakref import WeakSet

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, Summary
from prometheus_client.registry import Collector

from consul_prom.errors import LedgerError
from consul_prom.ledger.compat import check_library
from consul_prom.ledger.file import CREATED, IN_USE, VALUES, Contents, Family, Labels, Ledger
from consul_prom.ledger.parent_counts import FORK
from consul_prom.ledger.source import Listed, names_in, shows_nameless
from consul_prom.ledger.values import MappedValue, copy_cells, move, plain, totals
from consul_prom.logs import ThrottledLogger
from consul_prom.process.fork import FORK_LOCK

log = logging.getLogger(__name__)

SLICE: Final = 128  # series that are made in one go: half a millisecond
_KINDS: Final[dict[str, Any]] = {"counter": Counter, "summary": Summary, "histogram": Histogram}
_SUFFIXES: Final = {
    "counter": ("_total", "_created"),
    "summary": ("_count", "_sum", "_created"),
    "histogram": ("_bucket", "_count", "_sum", "_created"),
}

Chosen = Callable[[Labels], bool]


class LedgerRegistry:
    """*registry* with the values of its metrics in *ledger*: of those that there are, and of those that come.

    Raises:
        LedgerError: this prometheus_client does not look like what we know; nothing was touched.
    """

    totals: Final = True

    def __init__(self, registry: CollectorRegistry, ledger: Ledger) -> None:
        check_library()
        FORK.note()
        self._registry = registry
        self._ledger = ledger
        self._lock = threading.RLock()  # reentrant: a signal handler or the garbage collector may give birth in a birth
        self._entering = threading.RLock()
        self._bound: dict[Collector, _Bound] = {}
        self._shadows: dict[Family, Any] = {}
        self._untold: tuple[str, Exception | None] | None = None
        self._log = ThrottledLogger(log)
        self._register, self._unregister = registry.register, registry.unregister
        _CONTINUED.add(self)  # until it is closed
        vars(registry).update(register=self._on_register, unregister=self._on_unregister)
        for collector in list(registry._collector_to_names):
            with FORK_LOCK:
                self._try_enter(collector)

    def collect(self) -> Iterator[Metric]:
        """The page: totals, a family's inherited series last in it, families that nobody registered last of all."""
        return self._page(lambda _names: True)

    @property
    def shows_nameless(self) -> bool:
        """Whether a page of some names has collectors that have registered no name."""
        return shows_nameless(self._registry)

    def kind(self, name: str) -> type | None:
        """The class of the collector, or of the orphan, that has *name*."""
        registry: Any = self._registry
        collector = registry._names_to_collectors.get(name)
        if collector:
            return type(collector)
        kinds = (_KINDS[family.kind] for family in list(self._ledger.inherited) if name in _names(family))
        return next(kinds, None)

    def collectors(self) -> Listed:
        """All that the page has.

        Orphans are unregistered metrics of the library, one for each family that nobody has registered and whose
        names no collector has taken.
        """
        orphans = self._orphans()  # first: one that is registered meanwhile is on the page as what it is then
        registry: Any = self._registry
        with registry._lock:
            found = dict(registry._collector_to_names)
            taken = set(registry._names_to_collectors)
            target_info = registry._target_info_metric() if registry._target_info else None
        for collector in found:
            self._try_enter(collector)  # where it was registered a moment ago
        rest = {shadow: _names(family) for family, shadow in orphans if taken.isdisjoint(_names(family))}
        return Listed(target_info, found, rest)

    def families(self, collector: Any) -> Iterable[Metric]:
        """What the page has of one of `collectors`, by the library's own code."""
        bound = self._bound.get(collector)
        if bound:
            return self._families(bound)
        if collector in list(self._shadows.values()):
            with totals():
                return list(collector.collect())
        return collector.collect()  # type: ignore[no-any-return]

    def restricted_registry(self, names: Iterable[str]) -> Collector:
        """What `collect` gives, but only samples of these names, and only from collectors that have such."""
        return _Restricted(self, frozenset(names))

    def inherited(self, metric: Any) -> Any:
        """An unregistered metric of the library with the series of *metric* that no process has used since the start.

        None where there are none. One that is used is removed from it, so it only ever shrinks.
        """
        bound = self._bound.get(metric)
        return self._shadow(bound.family) if bound and bound.inherited else None

    def prepare(self) -> Iterator[None]:
        """Make what `inherited` and `collectors` give, a slice at a time: births wait for one of them at most."""
        for family, inherited in list(self._ledger.inherited.items()):
            if family in self._shadows or not family.labelnames:
                continue
            metric, wanted = _metric(family), list(inherited)
            for start in range(0, len(wanted), SLICE):
                with self._lock:
                    some = [labels for labels in wanted[start : start + SLICE] if labels in inherited]
                    self._inherit(metric, [(labels, inherited[labels]) for labels in some])
                yield
            with self._lock:
                for labels in metric._metrics.keys() - inherited.keys():  # they were used, or forgotten, meanwhile
                    del metric._metrics[labels]
                self._shadows.setdefault(family, metric)

    def close(self) -> None:
        """The registry is as it was, but for values that are ours, in memory. What was counted stays in the ledger."""
        self._let_go()
        for bound in list(self._bound.values()):
            bound.leave(stays=True)
        self._ledger.close()
        self.tell()

    def abandon(self) -> Iterator[Any]:
        """The same in a forked child, without a lock, which a thread that is gone may hold.

        Yield the metrics that had all series in the ledger. The series themselves are not looked at: there may be many.
        """
        self._let_go()
        copy_cells(self._ledger.cells, self._ledger.used)
        for bound in list(self._bound.values()):
            if bound.abandon():
                yield bound.metric

    def cell_of(self, bound: "_Bound", labels: Labels, created: float) -> int | None:
        """The first cell of a series that is born: it is inherited, or new, or there is none."""
        with self._lock:
            if labels in bound.inherited:
                cell = bound.inherited.pop(labels)
                self._ledger.claim(cell)
                self._unshadow(bound.family, labels)
                return cell
            try:
                return self._ledger.bear(bound.family, labels, created=created)
            except UnicodeEncodeError:  # which the page leaves out, and says so
                return None
            except LedgerError as error:
                self.note(
                    f"new series of {bound.family.name} are counted in memory only, the ledger takes no more: {error} "
                    "(CONSUL_PROM_DIR)"
                )
                return None

    def forget(self, family: Family, chosen: Chosen) -> None:
        """What is inherited, and *chosen* by its labels, goes."""
        with self._lock:
            inherited = self._ledger.inherited[family]
            for labels in [labels for labels in inherited if chosen(labels)]:
                self._ledger.drop(inherited.pop(labels))
                self._unshadow(family, labels)

    def _on_register(self, collector: Collector) -> None:
        self._register(collector)
        self._try_enter(collector)

    def _on_unregister(self, collector: Collector) -> None:
        self._unregister(collector)
        with self._entering:
            bound = self._bound.get(collector)
            if bound:
                bound.drop_all()
                self.forget(bound.family, _all)
                bound.leave(stays=False)
                del self._bound[collector]

    def _enter(self, collector: Any) -> None:
        if not isinstance(collector, Counter | Summary | Histogram):
            return
        with self._entering:
            if collector in self._bound or self not in _CONTINUED:
                return
            if collector not in self._registry._collector_to_names:
                return  # it was unregistered while a scrape listed it; who unregisters it now waits, and drops it
            bound = _Bound(self, self._ledger, collector)
            for family in list(self._ledger.inherited):
                if family.name == bound.family.name and family != bound.family:
                    self.forget(family, _all)  # its type, labels or buckets have changed
            with suppress(LedgerError), self._lock:  # its first series will say so, if it comes
                self._ledger.introduce(bound.family)
            bound.enter()
            self._bound[collector] = bound

    def _let_go(self) -> None:
        _CONTINUED.discard(self)
        for name in ("register", "unregister"):
            vars(self._registry).pop(name, None)

    def _page(self, wanted: Callable[[Sequence[str]], bool]) -> Iterator[Metric]:
        target_info, collectors, orphans = self.collectors()
        taken: set[str] = set()
        if target_info:
            yield target_info
        for collector, names in collectors.items():
            if wanted(names):
                found = list(self.families(collector))
                taken |= names_in(found) if orphans and not names else set()
                yield from found
        for shadow, names in orphans.items():
            if wanted(names) and taken.isdisjoint(names):
                yield from self.families(shadow)

    def _orphans(self) -> list[tuple[Family, Any]]:
        ours = {bound.family for bound in list(self._bound.values())}
        return [
            (family, self._shadow(family))
            for family, series in list(self._ledger.inherited.items())
            if series and family not in ours
        ]

    def _families(self, bound: "_Bound") -> list[Metric]:
        inherited = bound.inherited
        while True:
            with bound.lock:  # so that no series is on its way from the one to the other
                waiting = len(inherited)
            with totals():
                families = list(bound.metric.collect())
                if waiting:
                    for more in self._shadow(bound.family).collect():
                        families[0].samples += more.samples
            if len(inherited) == waiting:
                return families

    def _shadow(self, family: Family) -> Any:
        with self._lock:
            if family not in self._shadows:
                self._shadows[family] = self._new_shadow(family)
            return self._shadows[family]

    def _new_shadow(self, family: Family) -> Any:
        metric = _metric(family)
        self._inherit(metric, self._ledger.inherited[family].items())
        return metric

    def _inherit(self, metric: Any, series: Iterable[tuple[Labels, int]]) -> None:
        for labels, cell in series:
            child = metric.labels(*labels) if labels else metric
            move(child, self._ledger.cells, cell + CREATED, cell + VALUES, newborn=True)

    def _unshadow(self, family: Family, labels: Labels) -> None:
        if family in self._shadows:
            if labels:
                self._shadows[family]._metrics.pop(labels, None)
            else:
                del self._shadows[family]

    def _try_enter(self, collector: Collector) -> None:
        """Nothing that goes wrong here reaches the application."""
        try:
            self._enter(collector)
        except Exception as error:  # noqa: BLE001  # it is logged, later
            self.note(f"{collector!r} is counted in memory only: an error not expected", error)

    def note(self, sentence: str, error: Exception | None = None) -> None:
        """Of a birth, which holds a lock of the application's metric: a log handler may count its lines in that."""
        self._untold = self._untold or (sentence, error)

    def tell(self) -> None:
        """Log what births have noted, outside of all locks."""
        untold, self._untold = self._untold, None
        if untold:
            sentence, error = untold
            self._log.failed(sentence, exc_info=error)


class _Restricted:
    def __init__(self, source: LedgerRegistry, names: frozenset[str]) -> None:
        self._source = source
        self._names = names

    def collect(self) -> Iterator[Metric]:
        nameless = self._source.shows_nameless
        for family in self._source._page(lambda names: bool(self._names & set(names)) or (nameless and not names)):
            restricted: Metric | None = family._restricted_metric(self._names)  # type: ignore[no-untyped-call]
            if restricted:
                yield restricted


class _Bound:
    """A registered metric whose values are in cells. Births and deaths of its children happen under its `lock`."""

    def __init__(self, owner: LedgerRegistry, ledger: Ledger, metric: Any) -> None:
        bounds = tuple(metric._upper_bounds) if isinstance(metric, Histogram) else ()
        self.family = Family(
            metric._type, metric._name, tuple(metric._labelnames), bounds, str(metric._documentation), str(metric._unit)
        )
        self.metric = metric
        self.inherited = ledger.inherited[self.family]
        self.lock: Any = metric._lock if metric._labelnames else nullcontext()
        self._owner = owner
        self._ledger = ledger
        self._cells: dict[Labels, int] = {}

    def enter(self) -> None:
        """All series that there are, and from now on those that come."""
        if not self.family.labelnames:
            self.born((), self.metric, newborn=False)
            return
        self._adopt()
        for name, choose in _REMOVERS.items():
            if hasattr(self.metric, name):
                vars(self.metric)[name] = self._remover(getattr(self.metric, name), choose)

    def leave(self, *, stays: bool) -> None:
        """The metric is as before, but for its values; whether what they counted *stays* in a ledger."""
        with self.lock:
            for child in list(self.metric._metrics.values()) if self.family.labelnames else [self.metric]:
                for value in plain(child):
                    if isinstance(value, MappedValue):
                        value.leave(stays=stays)
            if self.family.labelnames:  # last: who reads cells knows by this that they are others
                self.metric._metrics = dict(self.metric._metrics)
        self._put_removers_back()

    def abandon(self) -> bool:
        """Undo `enter` in a forked child. Return whether all series of the metric were in the ledger."""
        self._put_removers_back()
        if not self.family.labelnames:
            return bool(self._cells)
        children = self.metric._metrics
        if type(children) is _Children:
            children.__class__ = _Abandoned  # type: ignore[assignment]  # a copy would write to all series, and share no page of them any more
        return len(self._cells) == len(children)

    def born(self, labels: Labels, child: Any, *, newborn: bool) -> None:
        """Nothing that goes wrong here reaches the application."""
        try:
            cell = self._owner.cell_of(self, labels, child._created)
            if cell is not None:
                self._cells[labels] = cell
                move(child, self._ledger.cells, cell + CREATED, cell + VALUES, newborn=newborn)
        except Exception as error:  # noqa: BLE001  # it is logged, later
            self._owner.note(f"a series of {self.family.name} is counted in memory only: an error not expected", error)

    def gone(self, labels: Labels) -> None:
        cell = self._cells.pop(labels, None)
        if cell is not None:
            self._ledger.drop(cell)

    def drop_all(self) -> None:
        for labels in list(self._cells):
            self.gone(labels)

    def _adopt(self) -> None:
        """Make the dictionary of children ours; of what it replaces, only what is in it lives on."""
        with self.lock:
            self.drop_all()
            found = self.metric._metrics
            for labels, child in found.items():
                self.born(labels, child, newborn=False)
            self.metric._metrics = _Children(self, found)

    def _put_removers_back(self) -> None:
        for name in _REMOVERS if self.family.labelnames else ():
            vars(self.metric).pop(name, None)

    def _remover(self, original: Callable[..., None], choose: Callable[..., Chosen]) -> Callable[..., None]:
        """*original*, and what was inherited goes too."""

        def remove(*arguments: Any, **options: Any) -> None:
            self._owner.forget(self.family, choose(self.family, *arguments, **options))
            original(*arguments, **options)
            if type(self.metric._metrics) is not _Children:  # `clear` leaves another dictionary
                self._adopt()

        return remove


class _Children(dict[Labels, Any]):
    """A labelled metric's `_metrics`: a child's birth is its entry here, its death its removal."""

    def __init__(self, bound: _Bound, children: dict[Labels, Any]) -> None:
        super().__init__(children)
        self._bound = bound

    def __setitem__(self, labels: Labels, child: Any) -> None:
        self._bound.born(labels, child, newborn=True)  # first, so that no scrape sees it without what it inherits
        super().__setitem__(labels, child)

    def __delitem__(self, labels: Labels) -> None:
        super().__delitem__(labels)
        self._bound.gone(labels)

    def pop(self, labels: Labels, *default: Any) -> Any:
        child = super().pop(labels, *default)
        self._bound.gone(labels)
        return child


class _Abandoned(dict[Labels, Any]):
    """In a forked child, what was `_Children`."""


def last_page(contents: Contents) -> CollectorRegistry:
    """A registry that shows what a ledger held when it was read.

    Of families whose names clash, that of the last process is shown, as on its own page.
    """
    registry = CollectorRegistry()
    metrics: dict[Family, Any] = {}
    taken: set[str] = set()
    for series in sorted(contents.series, key=lambda one: one.used != IN_USE):
        if series.family not in metrics:
            if not taken.isdisjoint(_names(series.family)):
                continue
            taken.update(_names(series.family))
            metrics[series.family] = _metric(series.family, registry)
        metric = metrics[series.family]
        cells: Any = array("d", (series.created, *(0.0 for _ in series.values)))
        move(metric.labels(*series.labels) if series.labels else metric, cells, 0, 1, newborn=True)
        cells[1:] = array("d", series.values)
    return registry


def _metric(family: Family, registry: CollectorRegistry | None = None) -> Any:
    options = {"buckets": family.bounds} if family.bounds else {}
    metric = _KINDS[family.kind](
        family.name, family.documentation, family.labelnames, unit=family.unit, registry=None, **options
    )
    metric._name = family.name  # the library would take one more suffix from it
    if registry:
        registry.register(metric)
    return metric


def _names(family: Family) -> list[str]:
    return [family.name, *(family.name + suffix for suffix in _SUFFIXES[family.kind])]


def _all(_labels: Labels) -> bool:
    return True


def _by_values(_family: Family, *labelvalues: object) -> Chosen:
    gone = tuple(str(value) for value in labelvalues)
    return lambda labels: labels == gone


def _by_some(family: Family, labels: object) -> Chosen:
    wanted = {name: str(value) for name, value in labels.items()} if isinstance(labels, dict) else {}
    return lambda found: bool(wanted) and wanted.items() <= dict(zip(family.labelnames, found, strict=True)).items()


_REMOVERS: Final[dict[str, Callable[..., Chosen]]] = {
    "clear": lambda _family: _all,
    "remove": _by_values,
    "remove_by_labels": _by_some,
}

_CONTINUED: Final[WeakSet[LedgerRegistry]] = WeakSet()


def _after_fork_in_child() -> None:
    for continued in list(_CONTINUED):
        try:
            FORK.copied(continued.abandon())
        except Exception:
            log.exception("a forked child may count into its parent's ledger: an error not expected")


os.register_at_fork(after_in_child=_after_fork_in_child)
