"""A continued registry: its page shows a slot's totals, everything else is as prometheus_client without us."""

import gc
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, Summary, values
from prometheus_client import exposition as plain_text
from prometheus_client.core import CounterMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics_text
from prometheus_client.registry import Collector

from consul_prom.errors import LedgerError
from consul_prom.ledger import values as ledger_values
from consul_prom.ledger.compat import check_library
from consul_prom.ledger.file import Family, Ledger, read
from consul_prom.ledger.parent_counts import FORK
from consul_prom.ledger.registry import LedgerRegistry, last_page
from consul_prom.ledger.values import MappedValue

NOW = 1_000_000.0
BUCKETS = (1, 5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.0.ledger"


class Worker:
    """One generation of a slot: a registry, metrics made at import, and the ledger from then on."""

    def __init__(self, path: Path, at_import: Callable[["Worker"], None] = lambda _: None, **changed: Any) -> None:
        self.registry = CollectorRegistry()
        self.hits = Counter("hits", "Hits.", ["route"], registry=self.registry)
        self.all = Counter("all", "All.", registry=self.registry)
        self.seconds = Histogram("seconds", "Time.", ["route"], registry=self.registry, buckets=BUCKETS)
        self.sizes = Summary("sizes", "Sizes.", ["route"], registry=self.registry)
        at_import(self)
        options = {"boot": "b", "instance": "web-1:0", "now": NOW, **changed}
        self.continued = LedgerRegistry(self.registry, Ledger.take_over(path, **options))

    def page(self, *names: str) -> dict[str, float]:
        source: Any = self.continued.restricted_registry(names) if names else self.continued
        return flat(source)

    def own(self) -> dict[str, float]:
        return flat(self.registry)


def text(source: Any) -> bytes:
    return bytes(plain_text.generate_latest(source))


def openmetrics(source: Any) -> bytes:
    return bytes(openmetrics_text.generate_latest(source))  # type: ignore[no-untyped-call]


def flat(source: Collector) -> dict[str, float]:
    """Samples by their text, but for times of creation; no sample is there twice."""
    found: dict[str, float] = {}
    for family in source.collect():
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                key = sample.name + "".join(f" {value}" for value in sample.labels.values())
                assert key not in found
                found[key] = sample.value
    return found


def use(worker: Worker, route: str = "/", times: int = 1) -> None:
    for _ in range(times):
        worker.hits.labels(route).inc(2)
        worker.all.inc()
        worker.seconds.labels(route).observe(3)
        worker.sizes.labels(route).observe(10)


class TestTotals:
    """What is counted over generations."""

    def test_goes_on(self, path: Path) -> None:
        """The page shows totals, series that were not used too; the registry shows what this process counted."""
        use(Worker(path), times=3)
        worker = Worker(path)
        assert worker.page() == {
            "hits_total /": 6,
            "all_total": 3,
            "sizes_count /": 3,
            "sizes_sum /": 30,
            "seconds_bucket / 1.0": 0,
            "seconds_bucket / 5.0": 3,
            "seconds_bucket / +Inf": 3,
            "seconds_count /": 3,
            "seconds_sum /": 9,
        }
        assert worker.own() == {"all_total": 0}
        use(worker)
        assert worker.page()["hits_total /"] == 8
        assert worker.page()["seconds_sum /"] == 12
        assert worker.own()["hits_total /"] == 2
        assert worker.registry.get_sample_value("all_total") == 1
        assert worker.hits.labels("/")._value.get() == 2
        assert worker.hits.labels("/")._value.total() == 8

    def test_counted_before(self, path: Path) -> None:
        """What was counted before the ledger was opened, as at import, counts once, in each generation."""
        for generation in range(1, 4):
            worker = Worker(path, use)
            assert worker.page()["hits_total /"] == worker.page()["seconds_sum /"] - generation == 2 * generation
            assert worker.own()["hits_total /"] == 2

    def test_late_callers(self, path: Path) -> None:
        """Who took hold of a value before the ledger was opened counts into it, in this generation and the next."""
        use(Worker(path))
        held: list[Any] = []
        worker = Worker(path, lambda it: held.extend((it.all._value, it.hits.labels("/")._value)))
        for value in held:
            value.inc(5)
            assert value.get() == 5
        assert (worker.page()["all_total"], worker.page()["hits_total /"]) == (6, 7)
        assert Worker(path).page()["hits_total /"] == 7

    def test_created_is_carried(self, path: Path) -> None:
        """A series keeps its time of creation, used or not, so that nobody takes it for a new one."""
        begun = time.time()
        first = Worker(path)
        use(first)
        created = [line for line in openmetrics(first.continued).splitlines() if b"_created" in line]
        assert all(begun <= float(line.split()[1]) <= time.time() for line in created)
        time.sleep(0.002)
        second = Worker(path)
        page = openmetrics(second.continued).splitlines()
        assert {line for line in page if b"_created" in line} == set(created)
        use(second)
        page = openmetrics(second.continued).splitlines()
        assert {line for line in page if b"_created" in line} == set(created)
        assert len(created) == 4

    def test_inherited_are_last(self, path: Path) -> None:
        """The page is, byte for byte, that of a registry with the same samples, inherited ones last in their family."""
        first = Worker(path)
        for route in ("/a", "/b", "/c"):
            use(first, route)
        second = Worker(path)
        use(second, "/b")
        same = Worker(path.with_name("other"), boot="c")
        same.all.inc(4)
        for route in ("/b", "/a", "/c"):
            use(same, route, 1 + (route == "/b"))
        same.all.reset()
        same.all.inc(4)
        bare = [line for line in text(second.continued).splitlines() if b"_created" not in line]
        assert bare == [line for line in text(same.registry).splitlines() if b"_created" not in line]

    def test_families_of_nobody(self, path: Path) -> None:
        """A family that this process has not registered yet is exposed too, with its unit and help, until it is."""
        first = Worker(path)
        Counter("late_seconds", 'H "\\\n', ["x"], unit="seconds", registry=first.registry).labels("é").inc(3)
        second = Worker(path)
        page = openmetrics(second.continued).decode()
        assert '# HELP late_seconds H \\"\\\\\\n\n# TYPE late_seconds counter\n# UNIT late_seconds seconds\n' in page
        assert second.page()["late_seconds_total é"] == 3
        late = Counter("late_seconds", "H", ["x"], unit="seconds", registry=second.registry)
        assert list(second.page()).count("late_seconds_total é") == 1
        late.labels("é").inc()
        assert second.page()["late_seconds_total é"] == 4

    def test_name_is_taken(self, path: Path) -> None:
        """What was left under a name that another collector has now is not exposed."""
        first = Worker(path)
        Counter("late", "-", registry=first.registry).inc(3)
        second = Worker(path)
        Gauge("late_total", "-", registry=second.registry).set(7)
        assert second.page()["late_total"] == 7

    def test_only_some_names(self, path: Path) -> None:
        """Of a page that is asked for by names, only these are there, inherited ones too."""
        use(Worker(path))
        worker = Worker(path)
        assert worker.page("hits_total", "all_total") == {"hits_total /": 2, "all_total": 1}
        worker.registry.set_target_info({"a": "b"})
        assert worker.page("target_info") == {"target_info b": 1}
        assert worker.page()["target_info b"] == 1

    def test_exemplars(self, path: Path) -> None:
        """Exemplars keep their meaning."""
        worker = Worker(path, lambda worker: worker.all.inc(1, {"trace": "a"}))
        assert b'all_total 1.0 # {trace="a"} 1.0' in openmetrics(worker.continued)
        worker.hits.labels("/").inc(1, {"trace": "b"})
        worker.seconds.labels("/").observe(3, {"trace": "c"})
        page = openmetrics(worker.continued)
        assert b'hits_total{route="/"} 1.0 # {trace="b"} 1.0' in page
        assert b'seconds_bucket{le="5.0",route="/"} 1.0 # {trace="c"} 3.0' in page

    @pytest.mark.parametrize("amount", [math.inf, -math.inf, math.nan])
    def test_not_finite(self, path: Path, amount: float) -> None:
        """A value that is not finite is shown until its process ends, and the next worker starts it at 0."""
        first = Worker(path)
        use(first)
        first.sizes.labels("/").observe(amount)
        first.sizes.labels("/unused").observe(amount)
        first.continued.close()
        first.continued = LedgerRegistry(first.registry, Ledger.take_over(path, boot="b", instance="web-1:0", now=NOW))
        for shown in (first.page(), first.own()):
            assert repr(shown["sizes_sum /"]) == repr(amount)
            assert shown["sizes_count /"] == 2
        second = Worker(path)
        page = second.page()
        assert (page["sizes_sum /"], page["sizes_count /"], page["sizes_sum /unused"]) == (0, 2, 0)
        second.sizes.labels("/").observe(3)
        assert (second.page()["sizes_sum /"], second.own()["sizes_sum /"]) == (3, 3)
        assert Worker(path).page()["sizes_sum /"] == 3

    def test_restart_in_one_process(self, path: Path) -> None:
        """A worker that stops and starts again in one process counts nothing twice, and the registry keeps its own."""
        worker = Worker(path, use)
        for total in (2, 2, 2):
            assert worker.page()["hits_total /"] == total
            worker.continued.close()
            assert worker.own()["hits_total /"] == 2
            ledger = Ledger.take_over(path, boot="b", instance="web-1:0", now=NOW)
            worker.continued = LedgerRegistry(worker.registry, ledger)
        use(worker)
        worker.continued.close()
        use(worker)  # counted between two lives: it stands in no ledger yet
        worker.continued = LedgerRegistry(
            worker.registry, Ledger.take_over(path, boot="b", instance="web-1:0", now=NOW)
        )
        assert worker.page()["hits_total /"] == 6
        assert worker.own()["hits_total /"] == 6

    def test_rare_errors(self, path: Path) -> None:
        """One error every 10 min under recycling each 5 s: the series never leaves, so each is a step of it."""
        shown = []
        for generation in range(0, 1800, 5):
            worker = Worker(path, now=NOW + generation)
            if generation % 600 == 0:
                worker.hits.labels("error").inc()
            shown.append(worker.page()["hits_total error"])
        assert shown == [1 + generation // 600 for generation in range(0, 1800, 5)]


class TestAsWithoutUs:
    """The application's own removal, reset and registration."""

    @pytest.mark.parametrize("used", [True, False], ids=["used", "inherited"])
    @pytest.mark.parametrize("way", ["remove", "remove_by_labels", "clear"])
    def test_removed(self, path: Path, way: str, *, used: bool) -> None:
        """What is removed is gone, inherited or not, stays gone in the next generation, and starts anew."""
        first = Worker(path)
        use(first, "/a")
        use(first, "/b")
        worker = Worker(path) if not used else first
        removal: dict[str, Callable[[], None]] = {
            "remove": lambda: worker.hits.remove("/a"),
            "remove_by_labels": lambda: worker.hits.remove_by_labels({"route": "/a"}),
            "clear": worker.hits.clear,
        }
        removal[way]()
        rest = {} if way == "clear" else {"hits_total /b": 2}
        for each in (worker, Worker(path)):
            assert {key: value for key, value in each.page().items() if "hits" in key} == rest
        worker = Worker(path)
        worker.hits.labels("/a").inc(1)
        assert worker.page()["hits_total /a"] == 1
        assert Worker(path).page()["hits_total /a"] == 1

    def test_wrong_removal(self, path: Path) -> None:
        """Removals that prometheus_client refuses are refused, and remove nothing."""
        use(Worker(path), "/a")
        worker = Worker(path)
        with pytest.raises(ValueError, match="Incorrect label count"):
            worker.hits.remove("/a", "b")
        with pytest.raises(ValueError, match="Unknown label names"):
            worker.hits.remove_by_labels({"nonsense": "/a"})
        with pytest.raises(TypeError):
            worker.hits.remove_by_labels("/a")  # type: ignore[arg-type]
        worker.hits.remove_by_labels({})
        assert worker.page()["hits_total /a"] == 2

    def test_late_caller_of_the_removed(self, path: Path) -> None:
        """Who still holds a removed child counts where nobody sees it, and not into its successor."""
        worker = Worker(path)
        child = worker.hits.labels("/")
        child.inc(5)
        worker.hits.remove("/")
        child.inc(5)
        worker.hits.labels("/").inc()
        child.inc(5)
        assert worker.page()["hits_total /"] == 1
        assert Worker(path).page()["hits_total /"] == 1

    def test_birth_after_clear(self, path: Path) -> None:
        """Children that are born after `clear` are in the ledger too."""
        worker = Worker(path)
        for _ in range(3):
            worker.hits.clear()
            worker.hits.labels("/").inc()
        assert Worker(path).page()["hits_total /"] == 1

    def test_reset(self, path: Path) -> None:
        """A counter that is reset starts at 0, with a new time of creation, in the next generation too."""
        first = Worker(path)
        first.all.inc(5)
        second = Worker(path)
        second.all.reset()
        assert second.page()["all_total"] == 0
        created = second.all._created
        second.all.inc()
        assert second.own()["all_total"] == 1
        third = Worker(path)
        assert third.page()["all_total"] == 1
        assert third.all._created == pytest.approx(created, abs=0.01)
        assert third.all._created > first.all._created

    @pytest.mark.parametrize("change", ["type", "labels", "buckets"])
    def test_changed_metric(self, path: Path, change: str) -> None:
        """A metric whose type, labels or buckets have changed starts anew, and the old one is gone for good."""
        first = Worker(path)
        Histogram("late", "-", ["x"], registry=first.registry, buckets=BUCKETS).labels("a").observe(1)
        second = Worker(path)
        makers: dict[str, Callable[[], Any]] = {
            "type": lambda: Summary("late", "-", ["x"], registry=second.registry),
            "labels": lambda: Histogram("late", "-", ["y"], registry=second.registry, buckets=BUCKETS),
            "buckets": lambda: Histogram("late", "-", ["x"], registry=second.registry, buckets=(1, 6)),
        }
        late = makers[change]()
        assert not any(key.startswith("late") for key in second.page())
        late.labels("a").observe(1)
        assert second.page()["late_count a"] == 1
        assert Worker(path).page()["late_count a"] == 1

    def test_documentation_changed(self, path: Path) -> None:
        """A metric whose help has changed goes on, under its new help."""
        first = Worker(path)
        Counter("late", "Old.", registry=first.registry).inc()
        second = Worker(path)
        Counter("late", "New.", registry=second.registry).inc()
        third = Worker(path)
        assert third.page()["late_total"] == 2
        assert b"# HELP late_total New." in text(third.continued)

    def test_unregistered(self, path: Path) -> None:
        """What is unregistered is gone, what was inherited too; another of its name starts anew."""
        use(Worker(path), "/old")
        worker = Worker(path)
        use(worker, "/new")
        worker.registry.unregister(worker.hits)
        for each in (worker.page(), worker.own()):
            assert not any("hits" in key for key in each)
        other = Counter("hits", "-", ["route"], registry=worker.registry)
        other.labels("/new").inc()
        worker.hits.labels("/new").inc(7)
        assert {key: value for key, value in worker.page().items() if "hits" in key} == {"hits_total /new": 1}
        assert Worker(path).page()["hits_total /new"] == 1

    def test_unregistered_while_listed(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is unregistered after a scrape has listed it is not bound again; the next worker has nothing of it."""
        worker = Worker(path)
        use(worker)
        enter = worker.continued._enter

        def unregister_first(collector: Any) -> None:
            if collector is worker.hits and collector in worker.registry._collector_to_names:
                worker.registry.unregister(collector)
            enter(collector)

        monkeypatch.setattr(worker.continued, "_enter", unregister_first)
        worker.page()
        worker.hits.labels("/").inc()
        assert not any("hits" in key for key in worker.page())
        registry = CollectorRegistry()
        ledger = Ledger.take_over(path, boot="b", instance="web-1:0", now=NOW)
        assert not any("hits" in key for key in flat(LedgerRegistry(registry, ledger)))

    def test_registered_again(self, path: Path) -> None:
        """A metric that is unregistered and registered again shows what it showed, plus what was counted meanwhile."""
        use(Worker(path))
        worker = Worker(path)
        use(worker)
        worker.registry.unregister(worker.hits)
        use(worker)
        worker.registry.register(worker.hits)
        assert worker.page()["hits_total /"] == 6
        assert worker.own()["hits_total /"] == 4
        use(worker)
        assert Worker(path).page()["hits_total /"] == 8

    def test_duplicate(self, path: Path) -> None:
        """A name that is taken is refused as before, and the one that has it goes on."""
        worker = Worker(path)
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            Counter("hits", "-", ["route"], registry=worker.registry)
        use(worker)
        assert worker.page()["hits_total /"] == 2

    def test_others_are_left_alone(self, path: Path) -> None:
        """Gauges, Info, Enum, custom collectors and other registries are as they were."""
        other = CollectorRegistry()
        foreign = Counter("foreign", "-", registry=other)

        class Custom(Collector):
            def collect(self) -> list[CounterMetricFamily]:
                return [CounterMetricFamily("custom", "-", value=worker.all._value.get())]

        worker = Worker(path)
        gauge = Gauge("gauge", "-", ["x"], registry=worker.registry)
        gauge.labels("a").inc(3)
        Info("info", "-", registry=worker.registry).info({"a": "b"})
        Enum("enum", "-", states=["x", "y"], registry=worker.registry).state("y")
        worker.registry.register(Custom())
        use(worker)
        expected = {"gauge a": 3, "info_info b": 1, "enum x": 0, "enum y": 1, "custom_total": 1}
        assert worker.page().items() >= expected.items()
        assert type(gauge.labels("a")._value) is values.MutexValue
        assert type(foreign._value) is values.MutexValue
        again = Worker(path)
        assert not {key for key in again.page() if key.startswith(("gauge", "info", "enum", "custom"))}

    def test_close(self, path: Path) -> None:
        """After the end, a registry's methods and dictionaries are the library's again, and counting goes on."""
        worker = Worker(path)
        use(worker)
        worker.continued.close()
        assert set(vars(worker.registry)) == set(vars(CollectorRegistry()))
        assert set(vars(worker.hits)) == set(vars(Counter("x", "-", ["a"], registry=None)))
        assert type(worker.hits._metrics) is dict
        use(worker)
        use(worker, "/more")
        assert worker.own()["hits_total /"] == 4
        assert "hits_total /more" not in Worker(path).page()

    def test_subclass(self, path: Path) -> None:
        """A subclass of the application's, which counts in its own way at birth, is continued too."""

        class Eager(Counter):
            def _metric_init(self) -> None:
                super()._metric_init()
                self._value.inc(1)

        for generation in (1, 2):
            worker = Worker(path)
            eager = Eager("eager", "-", ["x"], registry=worker.registry)
            eager.labels("a").inc()
            assert worker.page()["eager_total a"] == 2 * generation


class TestThreads:
    """Those that count all through the start."""

    def test_exact(self, path: Path) -> None:
        """Threads that count while values move into a ledger, out of it and into the next lose nothing."""
        worker = Worker(path)
        child, stop, counted = worker.seconds.labels("/"), threading.Event(), []

        def count() -> None:
            mine = 0
            inc, late = worker.all.inc, worker.all._value.inc
            while not stop.is_set():
                inc()
                late(1)
                child.observe(3)
                mine += 1
            counted.append(mine)

        worker.continued.close()
        threads = [threading.Thread(target=count) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            time.sleep(0.005)
            worker.continued = LedgerRegistry(
                worker.registry, Ledger.take_over(path, boot="b", instance="web-1:0", now=NOW)
            )
            time.sleep(0.005)
            worker.continued.close()
        worker.continued = LedgerRegistry(
            worker.registry, Ledger.take_over(path, boot="b", instance="web-1:0", now=NOW)
        )
        stop.set()
        for thread in threads:
            thread.join()
        assert worker.page()["all_total"] == 2 * sum(counted) == worker.own()["all_total"]
        assert worker.page()["seconds_count /"] == sum(counted)
        assert Worker(path).page()["all_total"] == 2 * sum(counted)

    def test_births_and_scrapes(self, path: Path) -> None:
        """While threads use what was inherited, each page shows each series once, and none less than before."""
        first = Worker(path)
        for number in range(300):
            first.hits.labels(str(number)).inc(5)
        worker = Worker(path)

        def use_all(numbers: range) -> None:
            for number in numbers:
                worker.hits.labels(str(number)).inc()

        threads = [threading.Thread(target=use_all, args=[range(part, 300, 3)]) for part in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            page = worker.page("hits_total")
            assert len(page) == 300
            assert set(page.values()) <= {5, 6}
        for thread in threads:
            thread.join()
        assert set(worker.page("hits_total").values()) == {6}

    def test_birth_in_a_birth(self, path: Path) -> None:
        """A signal handler or the garbage collector that gives birth in the middle of a birth finds its own room."""
        worker = Worker(path)
        bear, inner = Ledger.bear, iter(range(1000))

        def interrupted(ledger: Ledger, family: Family, labels: tuple[str, ...], **options: Any) -> int:
            if family.name == "hits":
                worker.sizes.labels(str(next(inner))).observe(1)
            return bear(ledger, family, labels, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ledger, "bear", interrupted)
            for number in range(100):
                worker.hits.labels(str(number)).inc()
        page = Worker(path).page()
        assert [page[f"hits_total {number}"] for number in range(100)] == [1] * 100
        assert [page[f"sizes_count {number}"] for number in range(100)] == [1] * 100

    def test_signal_storm(self, path: Path) -> None:
        """Signal handlers that give birth at any time leave a ledger that is whole."""
        worker = Worker(path)
        born: list[int] = []

        def handler(*_: object) -> None:
            worker.sizes.labels(f"s{len(born)}").observe(1)
            born.append(1)
            signal.setitimer(signal.ITIMER_REAL, 0.0003)

        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0003)
        try:
            number = 0
            while len(born) < 300:
                worker.hits.labels(str(number)).inc()
                number += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        page = Worker(path).page()
        assert sum(value for key, value in page.items() if key.startswith("hits_total")) == number
        assert sum(value for key, value in page.items() if key.startswith("sizes_count")) == len(born)


class TestForks:
    """Processes that the application forks, and workers that a master forked."""

    def test_child_counts_for_itself(self, path: Path) -> None:
        """Increments in a forked child stay in it: the parent's page shows the parent's only, whatever both do."""
        worker = Worker(path)
        use(worker)

        def child() -> object:
            use(worker, times=500)
            return worker.own()["hits_total /"]

        result = forked(child)
        use(worker, times=500)
        assert result() == 1002
        assert worker.page()["hits_total /"] == 1002
        assert Worker(path).page()["hits_total /"] == 1002

    def test_child_has_a_library_without_us(self, path: Path) -> None:
        """In a child, births, removals and registrations leave the parent's ledger alone."""
        worker = Worker(path)
        use(worker)

        def child() -> object:
            use(worker, "/child")
            worker.hits.clear()
            worker.registry.unregister(worker.sizes)
            Counter("new", "-", registry=worker.registry).inc()
            return sorted(vars(worker.registry)) == sorted(vars(CollectorRegistry()))

        assert forked(child)() is True
        assert worker.page()["hits_total /"] == 2
        assert not [key for key in Worker(path).page() if "child" in key or "new" in key]

    def test_costs_nothing_for_a_series(self, path: Path) -> None:
        """A fork touches no series: in a child, a value leaves its parent's ledger when it is used, and only then."""
        worker = Worker(path)
        for number in range(50):
            use(worker, str(number))
        cells = worker.all._value._cells

        def child() -> object:
            children: Any = worker.hits._metrics
            values = [one._value for one in children.values()]
            before = sum(value._cells is cells for value in values)
            worker.hits.labels("7").inc()
            return before, sum(value._cells is cells for value in values), worker.own()["hits_total 7"]

        assert forked(child)() == (50, 49, 3)

    def test_grandchild(self, path: Path) -> None:
        """A child's child counts for itself too, and a worker of its own leaves out what both before it counted."""
        worker = Worker(path)
        FORK.watch(worker.registry)
        use(worker, times=5)
        use(worker, "/other", times=5)

        def grandchild() -> object:
            use(worker)
            Counter("new", "-", registry=worker.registry).inc()
            own = worker.own()
            ledger = Ledger.take_over(path.with_name("other.ledger"), boot="b", instance="web-1:1", now=NOW)
            page = flat(LedgerRegistry(worker.registry, ledger))
            keys = ("hits_total /", "hits_total /other", "hits_total /born")
            return [own[key] for key in keys], [page[key] for key in keys], page["new_total"]

        def child() -> object:
            use(worker, times=2)
            use(worker, "/born", times=2)
            return forked(grandchild)()

        assert forked(child)() == ([16, 10, 4], [2, 0, 0], 1)
        assert worker.page()["hits_total /"] == 10

    def test_masters_counts_are_dropped(self, path: Path) -> None:
        """What the master counted before it forked is in no worker's total, and what the workers count is."""
        registry = CollectorRegistry()
        early, labelled = Counter("early", "-", registry=registry), Counter("labelled", "-", ["x"], registry=registry)
        FORK.watch(registry)
        early.inc(100)
        labelled.labels("a").inc(100)

        def child() -> object:
            early.inc()
            labelled.labels("a").inc(2)
            ledger = Ledger.take_over(path, boot="b", instance="web-1:0", now=NOW)
            page = flat(LedgerRegistry(registry, ledger))
            early.inc()
            return [page["early_total"], page["labelled_total a"], flat(registry)["early_total"]]

        assert forked(child)() == [1, 2, 102]
        assert forked(child)() == [3, 4, 102]
        assert flat(registry)["early_total"] == 100

    def test_child_without_a_ledger(self) -> None:
        """Where a child has no ledger, what its parent counted stands in no value of the library's."""
        registry = CollectorRegistry()
        early = Counter("early", "-", registry=registry)
        FORK.watch(registry)
        early.inc()
        before = sorted(vars(early._value))
        assert forked(lambda: sorted(vars(early._value)))() == before

    def test_child_becomes_a_worker(self, path: Path) -> None:
        """A worker's child that starts a worker of its own counts only what it counted itself."""
        worker = Worker(path)
        FORK.watch(worker.registry)
        use(worker, times=5)

        def child() -> object:
            use(worker, times=2)
            ledger = Ledger.take_over(path.with_name("shop.1.ledger"), boot="b", instance="web-1:1", now=NOW)
            return flat(LedgerRegistry(worker.registry, ledger))["hits_total /"]

        assert forked(child)() == 4
        assert worker.page()["hits_total /"] == 10


class TestTrouble:
    """What must not reach the application."""

    def test_disk_full(self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """On a full disk new series count in memory, on the page too, with one warning; those that are saved go on."""
        worker = Worker(path)
        use(worker)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        for number in range(2000):
            worker.hits.labels(str(number)).inc()
        use(worker)
        assert worker.page()["hits_total 1999"] == 1
        assert worker.page()["hits_total /"] == 4
        assert not caplog.records, "a log handler may count its lines in the metric whose lock a birth holds"
        for _ in range(2):
            worker.continued.tell()
        assert len(caplog.records) == 1
        assert "new series of hits are counted in memory only" in caplog.records[0].message
        assert "No space left on device" in caplog.records[0].message
        monkeypatch.undo()
        again = Worker(path)
        assert again.page()["hits_total /"] == 4
        assert "hits_total 1999" not in again.page()

    def test_bug_of_ours(self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """An error that we did not expect at a birth is logged, and the application counts on."""
        worker = Worker(path)
        monkeypatch.setattr(Ledger, "bear", lambda *_, **__: 1 / 0)
        worker.hits.labels("/").inc()
        assert worker.page()["hits_total /"] == 1
        worker.continued.tell()
        assert caplog.records[0].exc_info

    def test_lazy_help(self, path: Path) -> None:
        """A help text that becomes a string only when it is written, as Django's translated ones, is one."""

        class Lazy:
            def __str__(self) -> str:
                return "Hits."

            def replace(self, old: str, new: str) -> str:
                return str(self).replace(old, new)

        worker = Worker(path)
        Counter("lazy", Lazy(), registry=worker.registry).inc()  # type: ignore[arg-type]
        assert worker.page()["lazy_total"] == 1
        worker.continued.close()
        assert Worker(path).page()["lazy_total"] == 1

    def test_bug_at_registration(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An error that we did not expect leaves a metric in memory, and the application does not hear of it."""
        worker = Worker(path)
        monkeypatch.setattr(Ledger, "introduce", lambda *_: 1 / 0)
        Counter("other", "Others.", registry=worker.registry).inc()
        assert worker.page()["other_total"] == 1
        worker.continued.tell()
        assert caplog.records[0].exc_info

    @pytest.mark.parametrize("change", ["value", "children", "clear", "gone"])
    def test_unknown_library(self, path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A prometheus_client that does not look like what we know is not touched."""
        check_library()
        if change == "value":
            monkeypatch.setattr(values.MutexValue, "__init__", _strange)
        if change == "children":
            monkeypatch.setattr(Counter, "labels", lambda self, *_: self)
        if change == "clear":
            monkeypatch.setattr(Counter, "clear", lambda _self: None)
        if change == "gone":
            monkeypatch.setattr(ledger_values, "Summary", None)
        registry = CollectorRegistry()
        with pytest.raises(LedgerError, match="prometheus_client is of a version unknown to us"):
            LedgerRegistry(registry, Ledger.take_over(path, boot="b", instance="web-1:0"))
        assert set(vars(registry)) == set(vars(CollectorRegistry()))

    def test_nothing_is_kept_alive(self, path: Path) -> None:
        """A closed registry lets go of its mapping."""
        worker = Worker(path)
        use(worker)
        worker.continued.close()
        del worker
        gc.collect()
        assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf-8")

    def test_multiprocess_values(self, path: Path) -> None:
        """All values of a metric that is in a ledger are ours, so that a page reads totals only."""
        worker = Worker(path)
        use(worker)
        found = [worker.all._value, worker.seconds.labels("/")._sum, *worker.seconds.labels("/")._buckets]
        assert {type(value) for value in found} == {MappedValue}
        contents = read(path)
        assert contents
        assert {series.labels for series in contents.series} == {("/",), ()}


def test_names_that_clash(path: Path) -> None:
    """Of two families that cannot be on one page, the last process' is on the last page, whichever came first."""
    before = CollectorRegistry()
    LedgerRegistry(before, first := Ledger.take_over(path, boot="b", instance="web-1:0", now=NOW))
    Summary("req", "-", registry=before).observe(2)
    Counter("other", "-", registry=before).inc()
    first.close()
    after = CollectorRegistry()
    LedgerRegistry(after, second := Ledger.take_over(path, boot="b", instance="web-1:0", now=NOW))
    Counter("req_sum", "-", registry=after).inc(3)
    second.close()
    contents = read(path)
    assert contents
    assert flat(last_page(contents)) == {"req_sum_total": 3, "other_total": 1}


def _strange(value: Any, *_: object) -> None:
    value._value, value._lock = 0.0, threading.Lock()


def forked(act: Callable[[], object]) -> Callable[[], object]:
    """*act* in a forked child, which goes on meanwhile; gives what waits for its result."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writer, b"!")
            os.write(writer, repr(act()).encode())
        except BaseException:  # nothing may return into the tests from here
            logging.getLogger().exception("in the child")
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"!"  # it has let go of our ledger

    def result() -> object:
        with os.fdopen(reader, "rb") as answer:
            text = answer.read().decode()
        os.waitpid(pid, 0)
        return eval(text)  # noqa: S307  # numbers and booleans of our own child

    return result
