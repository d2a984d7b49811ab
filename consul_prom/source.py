"""What a page is written from: a registry's collectors, as they are or continued from a ledger."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector


class Source(Protocol):
    """`ContinuedRegistry` is one too."""

    @property
    def totals(self) -> bool:
        """Whether values that live in cells show what all of a slot's workers counted."""

    def prepare(self) -> Iterable[None]:
        """Some of what the others need, each item the work of less than a millisecond."""

    def collectors(self) -> tuple[Metric | None, list[Collector]]:
        """The target's information, and all collectors, in the order of the page."""

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

    def collectors(self) -> tuple[Metric | None, list[Collector]]:
        with self._registry._lock:
            target_info = self._registry._target_info_metric() if self._registry._target_info else None
            return target_info, list(self._registry._collector_to_names)

    def families(self, collector: Collector, /) -> Iterable[Metric]:
        return collector.collect()

    def inherited(self, _metric: Any, /) -> None:
        return None


class Only:
    """A collector of the metrics that it is given."""

    def __init__(self, *found: Metric) -> None:
        self._found = found

    def collect(self) -> Sequence[Metric]:
        return self._found
