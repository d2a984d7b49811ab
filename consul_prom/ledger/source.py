"""What a page is written from: a registry's collectors, as they are or continued from a ledger."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector


class Listed(NamedTuple):
    """A page's collectors, in its order, with the names that each has registered.

    The `orphans` come last, and only if no collector without registered names turns out to have theirs.
    """

    target_info: Metric | None
    collectors: Mapping[Collector, Sequence[str]]
    orphans: Mapping[Collector, Sequence[str]]


class Source(Protocol):
    """`LedgerRegistry` is one too."""

    @property
    def totals(self) -> bool:
        """Whether values that live in cells show what all of a slot's workers counted."""

    def prepare(self) -> Iterable[None]:
        """Some of what the others need, each item the work of less than a millisecond."""

    @property
    def shows_nameless(self) -> bool:
        """Whether a page of some names has collectors that have registered no name."""

    def kind(self, name: str, /) -> type | None:
        """The class of the collector that has registered *name*."""

    def collectors(self) -> Listed:
        """All that the page has."""

    def families(self, collector: Collector, /) -> Iterable[Metric]:
        """What the page has of one of them, by the library's own code."""

    def inherited(self, metric: Any, /) -> Any:
        """One more metric, of the same class, whose series follow those of *metric*; None where there is none."""


class Plain:
    """A registry as it is."""

    totals = False

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry: Any = registry

    def prepare(self) -> Iterable[None]:
        return ()

    @property
    def shows_nameless(self) -> bool:
        return shows_nameless(self._registry)

    def kind(self, name: str) -> type | None:
        collector = self._registry._names_to_collectors.get(name)
        return collector and type(collector)

    def collectors(self) -> Listed:
        with self._registry._lock:
            target_info = self._registry._target_info_metric() if self._registry._target_info else None
            return Listed(target_info, dict(self._registry._collector_to_names), {})

    def families(self, collector: Collector, /) -> Iterable[Metric]:
        return collector.collect()

    def inherited(self, _metric: Any, /) -> None:
        return None


def shows_nameless(registry: CollectorRegistry) -> bool:
    """Whether a page of some names of *registry* has collectors that have registered no name."""
    return getattr(registry, "_support_collectors_without_names", False)  # the library's since 0.25


def names_in(found: Iterable[Metric]) -> set[str]:
    """The names of metrics and of their samples."""
    return {name for metric in found for name in (metric.name, *(sample.name for sample in metric.samples))}


class Only:
    """A collector of the metrics that it is given."""

    def __init__(self, *found: Metric) -> None:
        self._found = found

    def collect(self) -> Sequence[Metric]:
        return self._found
