"""Where the library's classes keep their numbers, and whether we are right about it in the version installed."""

import logging
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from operator import is_not
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Summary, values
from prometheus_client import exposition as text
from prometheus_client.openmetrics import exposition as openmetrics

from consul_prom.exposition.family_renderer import METHODS, Family
from consul_prom.ledger.source import Only, Plain
from consul_prom.ledger.values import MutexValue

log = logging.getLogger(__name__)


class _Counters(Family):
    def suffixes(self) -> Sequence[str]:
        return ("_total",)

    def values(self, children: Sequence[Any]) -> list[Any]:
        return [child._value for child in children]


class _Gauges(_Counters):
    has_created = has_exemplars = False
    differs = is_not  # what is the same object has the same text

    def suffixes(self) -> Sequence[str]:
        return ("",)

    def fits(self, children: Sequence[Any]) -> bool:
        return set(map(type, children)) == {Gauge}  # each may get a function at any time

    def numbers(self, children: Sequence[Any], read: Sequence[float]) -> Sequence[float]:
        plain = METHODS[Gauge, "_child_samples"]
        functions = [child._child_samples.__func__ for child in children]
        if functions.count(plain) == len(functions):
            return read
        return [
            number if function is plain else self._ask(child)
            for child, function, number in zip(children, functions, read, strict=True)
        ]

    def _ask(self, gauge: Any) -> float:
        """What the function of a gauge says."""
        try:
            samples = gauge._child_samples()
        except Exception:
            self.callback_raised = True
            raise
        ((_, _, value, *_),) = samples
        return float(value)


class _Summaries(Family):
    has_exemplars = False

    def suffixes(self) -> Sequence[str]:
        return ("_count", "_sum")

    def values(self, children: Sequence[Any]) -> list[Any]:
        return [value for child in children for value in (child._count, child._sum)]


class _Histograms(Family):
    def parts(self) -> Sequence[object]:
        return tuple(self._collector._upper_bounds)

    def suffixes(self) -> Sequence[str]:
        bounds = self._collector._upper_bounds
        return ["_bucket"] * len(bounds) + ["_count"] + ["_sum"] * (bounds[0] >= 0)

    def fits(self, children: Sequence[Any]) -> bool:
        bounds = self._collector._upper_bounds
        return super().fits(children) and {tuple(child._upper_bounds) for child in children} == {tuple(bounds)}

    def values(self, children: Sequence[Any]) -> list[Any]:
        return [value for child in children for value in (*child._buckets, child._sum)]

    def numbers(self, children: Sequence[Any], read: Sequence[float]) -> Sequence[float]:  # noqa: ARG002
        numbers: list[float] = []
        buckets, has_sum = len(self._collector._upper_bounds), self._collector._upper_bounds[0] >= 0
        for start in range(0, len(read), buckets + 1):
            numbers += accumulate(read[start : start + buckets])
            numbers.append(numbers[-1])
            if has_sum:
                numbers.append(read[start + buckets])
        return numbers


class _Enums(Family):
    has_created = has_exemplars = False

    def parts(self) -> Sequence[object]:
        return tuple(self._collector._states)

    def suffixes(self) -> Sequence[str]:
        return [""] * len(self._collector._states)

    def fits(self, children: Sequence[Any]) -> bool:
        states = self._collector._states
        return super().fits(children) and {id(child._states) for child in children} == {id(states)}

    def values(self, children: Sequence[Any]) -> list[Any]:  # noqa: ARG002
        return []

    def numbers(self, children: Sequence[Any], read: Sequence[float]) -> Sequence[float]:  # noqa: ARG002
        states = range(len(self._collector._states))
        return [1.0 if state == child._value else 0.0 for child in children for state in states]


FAMILIES: Final = {Counter: _Counters, Gauge: _Gauges, Summary: _Summaries, Histogram: _Histograms, Enum: _Enums}


def known() -> dict[type, type[Family]]:
    """Our families by the library's classes, as far as they write the same as the library that is installed."""
    return {kind: family for kind, family in FAMILIES.items() if is_known(kind)}


@cache
def is_known(kind: Any) -> bool:
    """Whether our family writes two series of *kind* as the library does, in both formats. A millisecond once."""
    family = FAMILIES[kind]
    try:
        if values.ValueClass is not MutexValue:  # multiprocess mode: its values are files
            return False
        options = {"states": ["up", "down"]} if kind is Enum else {}
        registry = CollectorRegistry()
        metric = kind("a.b", 'Odd "\\\n".', ["b", "a.c"], registry=registry, **options)
        metric.labels("b", "{0}%s")
        _use(metric.labels('"\\\n', "ü"))
        source = Plain(registry)
        return list(source.collectors().collectors) == [metric] and all(
            b"".join(family(metric, encode, source=source, shows_exemplars=shows_exemplars).pieces())
            == encode(Only(*metric.collect())).removesuffix(encode(Only()))
            for encode, shows_exemplars in ((text.generate_latest, False), (openmetrics.generate_latest, True))
        )
    except Exception:
        log.debug("this prometheus_client is not as expected: its %s is left to it", kind.__name__, exc_info=True)
        return False


def _use(series: Any) -> None:
    match series:
        case Counter():
            series.inc(1e6, {"b": '"', "a": ""})
        case Gauge():
            series.set(-0.25)
        case Enum():
            series.state("down")
        case Histogram() | Summary():
            series.observe(0.3)
            series.observe(float("inf"))
