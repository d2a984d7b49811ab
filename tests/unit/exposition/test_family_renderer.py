"""Pages that are kept between scrapes: byte for byte what the installed prometheus_client writes, whatever happens."""

import gc
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self
from unittest.mock import Mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary, metrics, values
from prometheus_client import exposition as text
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from consul_prom.errors import LedgerError
from consul_prom.exposition import family_renderer, metric_types
from consul_prom.exposition import renderer as page_renderer
from consul_prom.exposition.renderer import Renderer
from consul_prom.ledger import registry as ledger_registry
from consul_prom.ledger import values as ledger_values
from consul_prom.ledger.file import Ledger, read
from consul_prom.ledger.registry import LedgerRegistry, last_page
from tests import ROOT
from tests.unit.pages import render

OPEN = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8"
ESCAPINGS = ("allow-utf-8", "underscores", "dots", "values")
ACCEPTED = (
    "",
    *(f"text/plain;version=1.0.0;escaping={one}" for one in ESCAPINGS),
    *(f"application/openmetrics-text;version=1.0.0;escaping={one}" for one in ESCAPINGS),
)
FORMATS: dict[str, Callable[[Any], bytes]] = {accept: text.choose_encoder(accept)[0] for accept in ACCEPTED}


class _OwnGauge(Gauge):
    """A subclass that shows another number."""

    def _child_samples(self) -> Any:
        return [sample._replace(value=sample.value + 1) for sample in super()._child_samples()]


class _Single(float):
    """A number as NumPy's float32 is: it equals what it would become in its resolution."""

    def __new__(cls, number: float) -> Self:
        return super().__new__(cls, struct.unpack("f", struct.pack("f", number))[0])

    def __ne__(self, other: object) -> bool:
        return float(self) != float(_Single(other)) if isinstance(other, float) else True

    __hash__ = float.__hash__


class _OwnCounter(Counter):
    """A subclass that changes nothing."""


class _Custom(Collector):
    """An application's own collector."""

    def __init__(self, name: str, number: float) -> None:
        self._name = name
        self._number = number

    def describe(self) -> list[Metric]:
        return [Metric(self._name, "", "gauge")]

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(self._name, "One.", value=self._number)
        counted = CounterMetricFamily("more." + self._name, "Two.", labels=["a"])
        counted.add_metric(['"\\\n'], self._number, created=12.5, timestamp=3)
        yield counted


class _Nameless(Collector):
    """A collector that registers no names."""

    def __init__(self, name: str) -> None:
        self._name = name

    def collect(self) -> list[Metric]:
        metric = Metric(self._name, "Mine.", "unknown")
        metric.add_sample("reqs_total", {"x": "1"}, 2)
        return [metric]


def _same(registry: CollectorRegistry | LedgerRegistry, renderer: Renderer, accept: str = OPEN) -> bytes:
    """The page, which is the library's."""
    page = render(renderer, accept=accept).body
    assert page == FORMATS[accept](registry)
    return page


def _same_or_unwritable(source: Any, renderer: Renderer, accept: str) -> None:
    try:
        wanted = FORMATS[accept](source)
    except UnicodeError:  # a lone surrogate
        return
    assert render(renderer, accept=accept).body == wanted


NAMES = st.sampled_from(["a", "b_total", "c", "d_created", "e.f", "g_bucket", "{0}", "# h"]) | st.text(max_size=5)
LABEL_NAMES = st.sampled_from(["x", "y", "a.b", "{0}", "%s", "method"]) | st.text(max_size=3)
LABELS = st.sampled_from(["1", "2", "", "{0}", '"', "\\", "\n", "\0", "\r\n", "\n\n", "ü", "\U0001f600"]) | st.text(
    max_size=3
)
THREE = st.tuples(*[st.sampled_from(["1", "2", '"\n'])] * 3) | st.tuples(*[LABELS] * 3)
NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 0.1, 1e6, 999_999.5, 1e16, 1e-7, 1e300, math.inf, math.nan, 123_456_789.25])
NUMBERS |= st.floats()
WHICH = st.integers(0, 12)
SUFFIXES = st.sampled_from(["", "_total", "_sum", "_count", "_bucket", "_created", "_info"])
enable_created: Callable[[], None] = metrics.enable_created_metrics
disable_created: Callable[[], None] = metrics.disable_created_metrics

KINDS: dict[str, Any] = {
    "counter": Counter,
    "gauge": Gauge,
    "summary": Summary,
    "histogram": Histogram,
    "enum": Enum,
    "info": Info,
    "own gauge": _OwnGauge,
    "own counter": _OwnCounter,
}


class Application(RuleBasedStateMachine):
    """An application that does anything with its registry, between scrapes in any format."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []
        self.recipes: list[Callable[..., Any]] = []
        self.begin()

    def begin(self) -> None:
        self.registry = CollectorRegistry()
        self.source: Any = self.registry
        self.renderer = Renderer(self.source)

    @initialize(labels=st.lists(st.sampled_from(["a.b", "x"]), max_size=2))
    def start(self, *, labels: list[str]) -> None:
        """With one of each kind, so that there is something to use at once."""
        for kind in KINDS:
            self.make(kind=kind, name=kind, help_="", labels=labels, unit="", states=["on", "off"], bounds=(0.5, 1))

    @rule(
        kind=st.sampled_from(sorted(KINDS)),
        name=NAMES,
        help_=st.text(max_size=8),
        labels=st.lists(LABEL_NAMES, max_size=3),
        unit=st.sampled_from(["", "", "seconds", "b\u00fc"]),
        states=st.lists(LABELS, min_size=1, max_size=3, unique=True),
        bounds=st.sampled_from([(1,), (0.1, 1e6), (-1, 2), (-0.0, 5)]),
    )
    def make(self, *, kind: str, name: str, help_: str, labels: Any, unit: str, states: Any, bounds: Any) -> None:
        options = {"enum": {"states": states}, "histogram": {"buckets": bounds}}.get(kind, {})
        recipe = partial(KINDS[kind], name, help_, labels, unit=unit, **options)
        try:
            self.made.append(recipe(registry=self.registry))
        except (ValueError, UnicodeError):  # the name is taken, or none
            return
        self.recipes.append(recipe)

    @rule(name=NAMES, number=NUMBERS)
    def collect(self, *, name: str, number: float) -> None:
        try:
            self.registry.register(_Custom(name, number))
        except ValueError:
            return

    @rule(acts=st.lists(st.tuples(WHICH, THREE, NUMBERS, st.booleans()), min_size=3, max_size=8))
    def use(self, *, acts: list[tuple[int, tuple[str, ...], float, bool]]) -> None:
        for which, labels, number, has_exemplar in acts:
            series = self._series(which, labels)
            exemplar = {"trace": labels[0]} if has_exemplar else None
            match series:
                case Counter():
                    series.inc(abs(number), exemplar)
                case Gauge():
                    series.set(number)
                case Histogram():
                    series.observe(number, exemplar)
                case Summary():
                    series.observe(number)
                case Enum():
                    series.state(series._states[-1 if has_exemplar else 0])
                case Info():
                    series.info({"one.more": labels[0]})

    @rule(which=st.lists(WHICH, min_size=3, max_size=3), labels=THREE, number=NUMBERS)
    def change(self, *, which: list[int], labels: tuple[str, ...], number: float) -> None:
        """Counters start anew; gauges get a function."""
        for one in which:
            series = self._series(one, labels)
            if isinstance(series, Counter):
                series.reset()
            if isinstance(series, Gauge):
                series.set_function(lambda: number)

    @rule(which=WHICH, nth=WHICH)
    def remove(self, *, which: int, nth: int) -> None:
        metric = self._chosen(which)
        if metric is not None and metric._labelnames and metric._metrics:
            metric.remove(*list(metric._metrics)[nth % len(metric._metrics)])

    @rule(which=WHICH)
    def clear(self, *, which: int) -> None:
        metric = self._chosen(which)
        if metric is not None and metric._labelnames:  # of one without it is an error before 0.26
            metric.clear()

    @rule(which=WHICH)
    def unregister_or_register(self, *, which: int) -> None:
        metric = self._chosen(which)
        try:
            if metric in self.registry._collector_to_names:
                self.registry.unregister(metric)
            elif metric is not None:
                self.registry.register(metric)
        except ValueError:
            return

    @rule(labels=st.dictionaries(st.sampled_from(["a", "b.c"]), LABELS, max_size=2))
    def tell_target(self, *, labels: dict[str, str]) -> None:
        self.registry.set_target_info(labels)

    @rule(is_on=st.booleans())
    def show_created(self, *, is_on: bool) -> None:
        enable_created() if is_on else disable_created()

    @invariant()
    def is_right(self) -> None:
        self.scrape(accept=OPEN)
        self.scrape(accept="")

    @rule(accept=st.sampled_from(sorted(FORMATS)))
    def scrape(self, *, accept: str) -> None:
        _same_or_unwritable(self.source, self.renderer, accept)

    @rule(accept=st.sampled_from(sorted(FORMATS)), nth=WHICH, suffixes=st.lists(SUFFIXES, min_size=1, max_size=3))
    def scrape_some(self, *, accept: str, nth: int, suffixes: list[str]) -> None:
        names = sorted({getattr(metric, "_name", "a") for metric in self.made}) or ["a"]
        names = [names[nth % len(names)] + suffix for suffix in suffixes]
        wanted = FORMATS[accept](self.source.restricted_registry(names))
        page = render(self.renderer, accept=accept, names=names).body
        assert page == wanted or sorted(page.splitlines()) == sorted(wanted.splitlines())  # of two, in any order

    def teardown(self) -> None:
        enable_created()

    def _series(self, which: int, labels: tuple[str, ...]) -> Any:
        metric = self._chosen(which)
        names = getattr(metric, "_labelnames", ())
        return metric.labels(*labels[: len(names)]) if names else metric

    def _chosen(self, which: int) -> Any:
        return self.made[which % len(self.made)] if self.made else None


class Generations(Application):
    """The same with a ledger: what one generation of the application counted, the next one goes on with."""

    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name, "shop.0.ledger")
        self.live([])

    def live(self, early: list[Callable[..., Any]]) -> None:
        """A process with a registry of its own; *early* metrics count before the ledger is opened."""
        self.registry = CollectorRegistry()
        self.made = []
        self.make_again(early)
        self.use(acts=[(number, ("1", "early", ""), 3.0, True) for number in range(len(self.made))])
        self.open()

    def open(self) -> None:
        self.ledger = Ledger.take_over(self.path, boot="b", instance="web-1:0")
        self.source = LedgerRegistry(self.registry, self.ledger)
        self.renderer = Renderer(self.source)

    @rule(early=st.integers(0, 2**9), late=st.integers(0, 2**9))
    def be_continued(self, *, early: int, late: int) -> None:
        """Of the metrics some are made before the ledger is opened, some later, and some never again."""
        self.ledger.close()
        by_number = list(enumerate(self.recipes))
        self.live([recipe for number, recipe in by_number if early >> number % 9 & 1])
        self.is_right()
        for recipe in [recipe for number, recipe in by_number if (late & ~early) >> number % 9 & 1]:
            self.make_again([recipe])
            self.is_right()

    def make_again(self, recipes: list[Callable[..., Any]]) -> None:
        for recipe in recipes:
            try:
                self.made.append(recipe(registry=self.registry))
            except ValueError:  # the name is taken by a metric of another generation
                continue

    @precondition(lambda self: self.source is not self.registry)  # it has not left for good
    @rule(comes_back=st.booleans())
    def leave(self, *, comes_back: bool) -> None:
        """The worker stops, and values live in memory, for good or until it starts again."""
        self.source.close()
        self.is_right()
        for accept in ("", OPEN):
            _same_or_unwritable(self.registry, Renderer(self.registry), accept)
        if comes_back:
            self.open()
        else:  # whose endpoint is closed: nobody asks for more of its pages
            self.source, self.renderer = self.registry, Renderer(self.registry)

    @rule()
    def be_adopted(self) -> None:
        """The caretaker's page of what the ledger holds."""
        contents = read(self.path)
        assert contents
        page = last_page(contents)
        renderer = Renderer(page)
        for accept in ("", OPEN, ""):
            _same_or_unwritable(page, renderer, accept)

    def teardown(self) -> None:
        super().teardown()
        self.ledger.close()
        self.directory.cleanup()


TestAnything = Application.TestCase
TestGenerations = Generations.TestCase
TestAnything.settings = TestGenerations.settings = settings(
    max_examples=settings().max_examples // 3, stateful_step_count=30
)


class TestChanges:
    """What changes between two scrapes, one thing at a time."""

    def test_series_in_place_of_another(self, registry: CollectorRegistry) -> None:
        """A series that is removed and another that comes are not taken for the same."""
        counter = Counter("reqs", "-", ["view"], registry=registry)
        renderer = Renderer(registry)
        counter.labels("a").inc()
        _same(registry, renderer)
        counter.remove("a")
        counter.labels("b").inc()
        assert b'view="b"' in _same(registry, renderer)

    def test_series_born_again(self, registry: CollectorRegistry) -> None:
        """A series that is removed and comes again starts anew."""
        counter = Counter("reqs", "-", ["view"], registry=registry)
        renderer = Renderer(registry)
        counter.labels("a").inc(5)
        _same(registry, renderer)
        counter.clear()
        _same(registry, renderer)
        counter.labels("a").inc()
        assert b'reqs_total{view="a"} 1.0\n' in _same(registry, renderer)

    def test_no_number(self, registry: CollectorRegistry) -> None:
        """NaN is not equal to itself, and may be the same object at each scrape."""
        gauge = Gauge("g", "-", registry=registry)
        counter = Counter("reqs", "-", ["x"], registry=registry)
        renderer = Renderer(registry)
        for _ in range(3):
            gauge.set(math.nan)
            counter.labels("1").inc(math.nan)
            assert _same(registry, renderer).count(b" NaN\n") == 2

    @pytest.mark.parametrize("labels", [(), ("x",)])
    def test_sign_of_zero(self, registry: CollectorRegistry, labels: tuple[str, ...]) -> None:
        """0.0 and -0.0 are equal, but not the same."""
        gauge = Gauge("g", "-", labels, registry=registry)
        renderer = Renderer(registry)
        for number in (0.0, -0.0, 0.0):
            (gauge.labels("1") if labels else gauge).set(number)
            assert f" {number}\n".encode() in _same(registry, renderer)

    @pytest.mark.parametrize("labels", [(), ("x",)])
    def test_amount_of_less_resolution(self, registry: CollectorRegistry, labels: tuple[str, ...]) -> None:
        """A number that compares in another resolution, as NumPy's float32 do, is written with its own digits."""
        counter = Counter("reqs", "-", labels, registry=registry)
        renderer = Renderer(registry)
        value = (counter.labels("1") if labels else counter)._value
        for number in (0.1, _Single(0.1), 0.1, 70001.3, _Single(70001.3)):
            value._value = number
            assert f" {float(number)!r}\n".encode() in _same(registry, renderer)

    def test_reset(self, registry: CollectorRegistry) -> None:
        """A counter that starts anew has a new time of creation, also where it was 0 before."""
        counter = Counter("reqs", "-", registry=registry)
        renderer = Renderer(registry)
        for number in (0, 3, 0):
            counter.inc(number)
            _same(registry, renderer)
            counter.reset()
            _same(registry, renderer)

    @pytest.mark.parametrize("accept", ["", OPEN])
    @pytest.mark.parametrize("when", [0.0, 1e9, 1_700_000_000.0, 1_700_000_000.1234567, 9_999_999_999.75, 1e10, -5.5])
    def test_time_of_creation(self, registry: CollectorRegistry, when: float, accept: str) -> None:
        """Any time of creation is written as the library does it."""
        counter = Counter("reqs", "-", registry=registry)
        counter._created = when
        assert b"reqs_created " in _same(registry, Renderer(registry), accept)

    def test_exemplars(self, registry: CollectorRegistry) -> None:
        """An exemplar comes, changes while its number stays, and goes."""
        counter = Counter("reqs", "-", registry=registry)
        histogram = Histogram("took", "-", ["x"], buckets=(1, 2), registry=registry).labels("1")
        renderer = Renderer(registry)
        _same(registry, renderer)
        for trace in ("a", 'b"\\\n', "c"):
            counter.inc(0, {"trace": trace, "b.c": "1"})
            histogram.observe(1.5, {"trace": trace})
            _same(registry, renderer)
            counter._value.set_exemplar(counter._value.get_exemplar()._replace(labels={"trace": trace * 2}))
            assert (trace * 2).encode("unicode_escape")[:1] in _same(registry, renderer)
            _same(registry, renderer, "")

    def test_created_is_switched(self, registry: CollectorRegistry) -> None:
        """Times of creation may be switched off and on at any time."""
        Counter("reqs", "-", registry=registry).inc()
        renderer = Renderer(registry)
        try:
            for switch in (disable_created, enable_created):
                _same(registry, renderer)
                switch()
            assert b"_created" in _same(registry, renderer)
        finally:
            enable_created()

    def test_gauge_gets_a_function(self, registry: CollectorRegistry) -> None:
        """A function beats the number, among plain gauges, and its failure is the caller's."""
        gauge = Gauge("g", "-", ["x"], registry=registry)
        renderer = Renderer(registry)
        for label in "abc":
            gauge.labels(label).set(1)
        _same(registry, renderer)
        gauge.labels("b").set_function(lambda: 7)
        assert b'{x="b"} 7.0\n' in _same(registry, renderer)
        gauge.labels("b").set_function(lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            render(renderer)

    @pytest.mark.parametrize("bounds", [(-1, 2), (0, 1), (-0.0, 1), (1e6, 1e7), (0.1, math.inf)])
    @pytest.mark.parametrize("accept", ["", OPEN])
    def test_buckets(self, registry: CollectorRegistry, bounds: tuple[float, ...], accept: str) -> None:
        """Buckets of any bounds; with one below 0 the library shows no sum."""
        histogram = Histogram("took", "-", ["x"], buckets=bounds, registry=registry)
        renderer = Renderer(registry)
        for number in (-5, 0.5, 1e9):
            histogram.labels("1").observe(number)
            histogram.labels("2").observe(number)
            page = _same(registry, renderer, accept)
        assert (b"took_sum" in page) == (bounds[0] >= 0)

    @pytest.mark.parametrize("name", ["a\nb", "a\0b", "{0}", "%s", 'a"b', "# a", "a b", "ü"])
    @pytest.mark.parametrize("accept", sorted(FORMATS))
    def test_odd_names(self, registry: CollectorRegistry, name: str, accept: str) -> None:
        """Names, label names, label values, states and help may have any character."""
        counter = Counter(name, name, [name], registry=registry)
        Enum(name + "state", name, states=[name, "b"], registry=registry)
        renderer = Renderer(registry)
        for value in (name, "b"):
            counter.labels(value).inc()
            _same(registry, renderer, accept)

    def test_many_series(self, registry: CollectorRegistry) -> None:
        """More series than are looked at in one go: some come, some go, some change."""
        counter = Counter("reqs", "-", ["n"], registry=registry)
        renderer = Renderer(registry)
        for number in range(3 * family_renderer.BLOCK):
            counter.labels(number).inc(number)
        _same(registry, renderer)
        counter.labels(family_renderer.BLOCK + 1).inc()
        _same(registry, renderer)
        for number in range(family_renderer.BLOCK // 2, 3 * family_renderer.BLOCK, 2):
            counter.remove(number)
        _same(registry, renderer)
        counter.labels("last").inc()
        _same(registry, renderer)
        _same(registry, renderer, "")


class TestLeftToTheLibrary:
    """What we do not know is written by the library, and the page is right."""

    def test_subclasses(self, registry: CollectorRegistry) -> None:
        """A subclass may show anything."""
        gauge = _OwnGauge("g", "-", ["x"], registry=registry)
        gauge.labels("1").set(4)
        assert b'g{x="1"} 5.0\n' in _same(registry, Renderer(registry))

    @pytest.mark.parametrize("method", ["_samples", "_child_samples"])
    def test_instance_with_a_method_of_its_own(self, registry: CollectorRegistry, method: str) -> None:
        """A metric, or one series of it, may have been given a method."""
        counter = Counter("reqs", "-", ["x"], registry=registry)
        counter.labels("1").inc()
        child: Any = counter.labels("2")
        samples = child._child_samples()
        setattr(child, method, types.MethodType(lambda _self: [samples[0]._replace(value=42)], child))
        assert b'reqs_total{x="2"} 42.0\n' in _same(registry, Renderer(registry))

    def test_collector_with_a_method_of_its_own(self, registry: CollectorRegistry) -> None:
        """A metric that was given a `collect`, also between two scrapes, is asked through it."""
        counter = Counter("reqs", "-", registry=registry)
        renderer = Renderer(registry)
        _same(registry, renderer)
        vars(counter)["collect"] = list
        assert b"reqs" not in _same(registry, renderer)

    def test_series_that_fails_midway(self, registry: CollectorRegistry) -> None:
        """Where the last of many series is not as it should be, no line of those before it is there twice."""
        gauge = Gauge("g", "-", ["x"], registry=registry)
        for number in range(3 * family_renderer.BLOCK):
            gauge.labels(number).set(number)
        renderer = Renderer(registry)
        for odd in (True, False, True):
            gauge._value = gauge.labels(number)._value
            if odd:
                gauge.labels(number)._value = types.SimpleNamespace(get=lambda: 42.0, get_exemplar=lambda: None)
            assert _same(registry, renderer).count(b'g{x="0"} ') == 1
            gauge.labels(number)._value = gauge._value
            gauge.labels(number + 1 + odd).set(1)

    def test_class_that_was_changed(self, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
        """A class of the library may be changed between two scrapes."""
        Summary("size", "-", registry=registry)
        renderer = Renderer(registry)
        _same(registry, renderer)
        monkeypatch.setattr(Summary, "_child_samples", lambda _self: [("_sum", {}, 42.0, None, None, None)])
        assert b"size_sum 42.0\n" in _same(registry, renderer)

    def test_values_of_another_class(self, registry: CollectorRegistry) -> None:
        """Values that are not the library's own are read by their `get`."""

        class Value(values.MutexValue):
            def get(self) -> float:
                return 42.0

        counter = Counter("reqs", "-", registry=registry)
        counter._value = Value("", "", "", (), (), "")  # type: ignore[no-untyped-call]
        assert b"reqs_total 42.0\n" in _same(registry, Renderer(registry))

    def test_registry_of_another_class(self) -> None:
        """A registry may be anything that collects."""

        class Twice(CollectorRegistry):
            def collect(self) -> Iterator[Metric]:
                yield from [*super().collect()] * 2

        registry = Twice()
        Gauge("g", "-", registry=registry)
        assert _same(registry, Renderer(registry)).count(b"# HELP g ") == 2

    def test_multiprocess_mode(self, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
        """In multiprocess mode values are files, and the library's own affair."""
        metric_types.is_known.cache_clear()
        monkeypatch.setattr(values, "ValueClass", type("MmapedValue", (values.MutexValue,), {}))
        try:
            Counter("reqs", "-", registry=registry).inc()
            _same(registry, Renderer(registry))
            assert metric_types.known() == {}
        finally:
            metric_types.is_known.cache_clear()

    def test_library_that_writes_otherwise(self, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where a version of the library keeps its numbers otherwise, its class is left to it, and the others not."""
        metric_types.is_known.cache_clear()
        monkeypatch.setattr(
            metric_types._Summaries, "values", lambda _self, children: [child._total for child in children]
        )
        monkeypatch.setattr(metric_types._Histograms, "suffixes", lambda _self: ["_bucket", "_gsum"])
        monkeypatch.setattr(
            metric_types._Counters, "numbers", lambda _self, _children, read: [number + 1 for number in read]
        )
        try:
            assert set(metric_types.known()) == {Enum, Gauge}
            for kind in (Counter, Summary, Histogram):
                kind(kind.__name__, "-", registry=registry)
            _same(registry, Renderer(registry))
        finally:
            metric_types.is_known.cache_clear()

    def test_all_are_known(self) -> None:
        """All classes but Info are ours in the version that is installed."""
        assert set(metric_types.known()) == {Counter, Gauge, Summary, Histogram, Enum}


class TestContinued:
    """A registry with a ledger."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "shop.0.ledger"

    def _continue(self, registry: CollectorRegistry, path: Path) -> LedgerRegistry:
        return LedgerRegistry(registry, Ledger.take_over(path, boot="b", instance="web-1:0"))

    @pytest.mark.parametrize("labels", [(), ("x",)])
    def test_moves_after_a_scrape(self, registry: CollectorRegistry, path: Path, labels: tuple[str, ...]) -> None:
        """Values and exemplars are read where they are, wherever they were at the last scrape."""
        counter = Counter("reqs", "-", labels, registry=registry)
        series = counter.labels("1") if labels else counter
        series.inc(2, {"trace": "a"})
        renderer = Renderer(registry)
        _same(registry, renderer)
        for number in range(3):
            continued = self._continue(registry, path)
            pages = Renderer(continued)
            _same(continued, pages)
            series.inc(1, {"trace": f"b{number}"})
            series.inc(1, {"trace": f"c{number}"})
            assert f" {4.0 + 3 * number} # ".encode() in _same(continued, pages)
            _same(registry, renderer)
            registry.unregister(counter)
            _same(continued, pages)
            registry.register(counter)
            series.inc(0, {"trace": f"d{number}"})
            assert f'd{number}"'.encode() in _same(continued, pages)
            continued.close()
            series.inc(1, {"trace": f"e{number}"})
            _same(continued, pages)
            _same(registry, renderer)

    def test_ledger_is_full(self, registry: CollectorRegistry, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A family of which some series live in the ledger and others in memory, in cells of their own or in none."""
        continued = self._continue(registry, path)
        counter = Counter("reqs", "-", ["x"], registry=registry)
        renderer = Renderer(continued)
        counter.labels("1").inc(3)
        counter.labels("0").inc(2)
        monkeypatch.setattr(Ledger, "bear", Mock(side_effect=LedgerError("it is full")))
        monkeypatch.setattr(Renderer, "_by_library", None)
        for label in "23":
            counter.labels(label).inc(4)
            _same(continued, renderer)
        for label in "123":
            counter.labels(label).inc()
            _same(continued, renderer)
            counter.labels(label).reset()
            assert f'reqs_total{{x="{label}"}} 0.0\n'.encode() in _same(continued, renderer)
        for label in "23":
            counter.remove(label)
        registry.unregister(counter)  # what was in the ledger leaves it
        registry.register(counter)
        for label in "10":
            counter.labels(label).inc()
            _same(continued, renderer)

    @pytest.mark.parametrize("is_registered", [True, False])
    def test_inherited_in_slices(self, path: Path, monkeypatch: pytest.MonkeyPatch, *, is_registered: bool) -> None:
        """Inherited series are made some at a time, and are right where some are used or removed meanwhile."""
        registry = CollectorRegistry()
        self._continue(registry, path)
        counter = Counter("reqs", "-", ["x"], registry=registry)
        for number in range(4 * ledger_registry.SLICE):
            counter.labels(number).inc()
        registry = CollectorRegistry()
        source = self._continue(registry, path)
        counter = Counter("reqs", "-", ["x"], registry=registry if is_registered else None)
        made = Mock(side_effect=ledger_values.move)
        monkeypatch.setattr(ledger_registry, "move", made)
        counts = [0]
        for number, _ in enumerate(source.prepare()):
            counts.append(made.call_count)
            if is_registered:
                counter.labels(number).inc()
                counter.labels(ledger_registry.SLICE * 4 - 1 - number).inc()
                counter.remove(str(100 + number))
            counts.append(made.call_count)
        assert max(after - before for before, after in pairwise(counts)) == ledger_registry.SLICE
        before = made.call_count
        page = _same(source, Renderer(source))
        assert made.call_count == before
        assert page.count(b"reqs_total{") == 4 * (ledger_registry.SLICE - is_registered)

    def test_inherited_in_their_order(self, registry: CollectorRegistry, path: Path) -> None:
        """Those that the process used come first; those that it did not, last in their family, until it does."""
        counters = [Counter(name, "-", ["x"], registry=registry) for name in ("reqs", "took")]
        self._continue(registry, path)
        for number in range(2 * family_renderer.BLOCK):
            for counter in counters:
                counter.labels(number).inc()
        registry = CollectorRegistry()
        counter = Counter("reqs", "-", ["x"], registry=registry)
        continued = self._continue(registry, path)
        renderer = Renderer(continued)
        for number in (2 * family_renderer.BLOCK - 1, 3, 2 * family_renderer.BLOCK):
            counter.labels(number).inc()
            page = _same(continued, renderer)
            _same(continued, renderer, "")
        assert re.findall(rb'reqs_total{x="(\d+)"} (.*)', page)[:4] == [
            (b"1023", b"2.0"),
            (b"3", b"2.0"),
            (b"1024", b"1.0"),
            (b"0", b"1.0"),
        ]
        counter.remove(5)
        assert b'reqs_total{x="5"}' not in _same(continued, renderer)

    @pytest.mark.parametrize("name", ["reqs", "reqs_total"])
    def test_becomes_a_collector_without_names(self, registry: CollectorRegistry, path: Path, name: str) -> None:
        """An inherited family is not on the page if a collector that has registered no names shows it."""
        counter = Counter("reqs", "-", ["x"], registry=registry)
        Counter("gone", "-", registry=registry).inc()
        self._continue(registry, path)
        counter.labels("1").inc()
        registry = CollectorRegistry()
        continued = self._continue(registry, path)
        registry.register(_Nameless(name))
        page = _same(continued, Renderer(continued))
        assert page.count(b"# HELP reqs") == 1
        assert b"gone_total 1.0\n" in page

    def test_label_that_cannot_be_encoded(self, registry: CollectorRegistry, path: Path) -> None:
        """A series with such a label is counted in memory, and neither its slot's ledger nor any page has it."""
        counter = Counter("reqs", "-", ["x"], registry=registry)
        self._continue(registry, path)
        for label in ("a", "\udcff", "b"):
            counter.labels(label).inc()
        assert counter.labels("\udcff")._value.get() == 1
        contents = read(path)
        assert contents
        assert [series.labels for series in contents.series] == [("a",), ("b",)]
        again = CollectorRegistry()
        continued = self._continue(again, path)
        Counter("reqs", "-", ["x"], registry=again).labels("\udcff").inc()
        assert re.findall(rb'reqs_total{x="(.*)"} (.*)', render(continued, accept=OPEN).body) == [
            (b"a", b"1.0"),
            (b"b", b"1.0"),
        ]

    def test_suffix_that_is_twice_there(self, registry: CollectorRegistry, path: Path) -> None:
        """A name may end in what the library takes from names."""
        counter = Counter("reqs_total_total", "-", ["x"], registry=registry)
        self._continue(registry, path)
        counter.labels("1").inc()
        registry = CollectorRegistry()
        continued = self._continue(registry, path)
        renderer = Renderer(continued)
        assert b'\nreqs_total_total{x="1"} 1.0\n' in _same(continued, renderer)
        counter = Counter("reqs_total_total", "-", ["x"], registry=registry)
        assert b'\nreqs_total_total{x="1"} 1.0\n' in _same(continued, renderer)

    def test_closed(self, registry: CollectorRegistry, path: Path) -> None:
        """A metric that comes after the end of the worker is not in the ledger, whoever still asks for pages."""
        continued = self._continue(registry, path)
        continued.close()
        counter = Counter("late", "-", registry=registry)
        _same(continued, Renderer(continued))
        assert type(counter._value) is values.MutexValue

    def test_left_to_the_library(self, registry: CollectorRegistry, path: Path) -> None:
        """A metric that the library has to write shows totals too, and what is inherited."""
        for number in range(3):
            registry = CollectorRegistry()
            counter = _OwnCounter("reqs", "-", ["x"], registry=registry)
            continued = self._continue(registry, path)
            counter.labels(f"{number // 2}").inc()
            page = _same(continued, Renderer(continued))
        assert re.findall(rb'reqs_total{x="(\d+)"} (.*)', page) == [(b"1", b"1.0"), (b"0", b"2.0")]


class TestKept:
    """What is kept between scrapes."""

    def test_nothing_else_is_written_by_the_library(
        self, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From the second scrape on the library is asked for nothing that we know."""
        Counter("reqs", "-", ["x"], registry=registry).labels("1").inc()
        Enum("state", "-", states=["a"], registry=registry)
        renderer = Renderer(registry)
        page = _same(registry, renderer)
        monkeypatch.setattr(Renderer, "_by_library", None)
        monkeypatch.setattr(family_renderer.Family, "_take_apart", None)
        assert render(renderer, accept=OPEN).body == page

    def test_what_is_gone_is_let_go(self, registry: CollectorRegistry) -> None:
        """Neither series nor metrics that are gone are held after the next scrape."""
        kept, gone = (Counter(name, "-", ["x"], registry=registry) for name in ("kept", "gone"))
        renderer = Renderer(registry)
        children = []
        for number in range(2 * family_renderer.BLOCK):
            children.append(weakref.ref(kept.labels(number)))
            children.append(weakref.ref(gone.labels(number)))
        _same(registry, renderer)
        kept.clear()
        registry.unregister(gone)
        parent = weakref.ref(gone)
        del gone
        _same(registry, renderer)
        gc.collect()
        assert [child for child in (parent, *children) if child()] == []

    def test_fewer_series(self, registry: CollectorRegistry) -> None:
        """Where many series became few, the rest is not held."""
        counter = Counter("reqs", "-", ["x"], registry=registry)
        children = [weakref.ref(counter.labels(number)) for number in range(3 * family_renderer.BLOCK)]
        renderer = Renderer(registry)
        _same(registry, renderer)
        for number in range(1, 3 * family_renderer.BLOCK):
            counter.remove(number)
        _same(registry, renderer)
        gc.collect()
        assert sum(child() is not None for child in children) == 1

    def test_formats(self, registry: CollectorRegistry) -> None:
        """Of the formats only those that were asked for last are kept."""
        Counter("reqs", "-", registry=registry).inc()
        renderer = Renderer(registry)
        for accept in FORMATS:
            _same(registry, renderer, accept)
            assert len(renderer._kept) <= page_renderer.FORMATS_KEPT

    def test_format_that_nobody_asks_for(self, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
        """A format that was not asked for in minutes is let go."""
        Counter("reqs", "-", registry=registry).inc()
        renderer = Renderer(registry)
        _same(registry, renderer, "")
        _same(registry, renderer)
        assert len(renderer._kept) == 2
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + page_renderer.FORGET + 1)
        _same(registry, renderer)
        assert len(renderer._kept) == 1


class TestThreads:
    """An application that goes on while its page is written."""

    def test_no_torn_line(self, registry: CollectorRegistry) -> None:
        """Births, removals, clears and unregistrations from other threads leave each line whole, and its own."""
        counter = Counter("reqs", "-", ["n"], registry=registry)
        others = Gauge("other", "-", ["n"], registry=registry)
        ends = threading.Event()

        def churn(first: int) -> None:
            number = first
            while not ends.is_set():
                number = (number + 7) % 2000
                counter.labels(number)._value.set(number + 0.5)
                others.labels(number).set(number + 0.5)
                counter.remove((number * 31) % 2000)
                if number % 500 < 7:
                    counter.clear()

        def come_and_go() -> None:
            while not ends.is_set():
                registry.unregister(others)
                registry.register(others)

        threads = [threading.Thread(target=churn, args=(number,)) for number in range(3)]
        threads.append(threading.Thread(target=come_and_go))
        for thread in threads:
            thread.start()
        renderer = Renderer(registry)
        line = re.compile(rb'(?:reqs_total|other){n="(\d+)"} (?:\1\.5|0\.0)|reqs_created{n="\d+"} \S+|# .*')
        try:
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                for accept in ("", OPEN):
                    wrong = [
                        found
                        for found in render(renderer, accept=accept).body.splitlines()
                        if not line.fullmatch(found)
                    ]
                    assert wrong == []
        finally:
            ends.set()
            for thread in threads:
                thread.join()
        _same(registry, renderer)
        _same(registry, renderer, "")


@pytest.mark.full
@pytest.mark.timeout(1200)  # to make a failure small, hypothesis takes up to five minutes
@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_supported_versions(which: str, tmp_path: Path) -> None:
    """All of this is true of the oldest prometheus_client that we support, and of the newest there is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = (one for one in project["dependencies"] if one.startswith("prometheus-client"))
    wanted = wanted.replace(">=", "==") if which == "oldest" else wanted
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), wanted]
    subprocess.run(install, check=True, timeout=300)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    where = f"import prometheus_client; assert prometheus_client.__file__.startswith({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", where], env=environ, check=True, timeout=300)
    options = ("--timeout=500", "--hypothesis-profile=thorough")
    run = [sys.executable, "-m", "pytest", *options, __file__, str(Path(__file__).with_name("test_renderer.py"))]
    done = subprocess.run(run, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stdout
