"""Any order of counting, scrapes, ends and starts: what Prometheus models counted, plus the unscraped, is the truth.

Virtual workers share a directory; a killed one is a registry that nobody asks any more, as the kernel keeps what it
wrote. The truth is kept by hand: what was counted in a slot, less what the application itself removed or reset.
"""

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry, Counter, Histogram

from consul_prom import ledger
from consul_prom.continued import ContinuedRegistry
from consul_prom.ledger import KEEP, Ledger

SLOTS = range(3)
LABELS = st.sampled_from(["a", "b", "é\0"])
BUCKETS = [(1.0, 5.0), (2.0, 5.0)]
Key = tuple[str, ...]


class Worker:
    """A generation of a slot; `made` before its ledger is opened, as metrics are at import."""

    def __init__(self, path: Path, slot: int, *, now: float, bounds: tuple[float, ...]) -> None:
        self.slot = slot
        self.bounds = bounds
        self.registry = CollectorRegistry()
        self.hits = Counter("hits", "-", ["x"], registry=self.registry)
        self.plain = Counter("plain", "-", registry=self.registry)
        self.late: Histogram | None = None
        self.own: dict[Key, float] = defaultdict(float)
        self._path, self._now = path, now

    def open(self) -> None:
        book = Ledger.take_over(self._path, boot="b", instance=f"web-1:{self.slot}", now=self._now)
        self.continued = ContinuedRegistry(self.registry, book)
        self.close = book.close  # as the kernel does of a killed one

    def seconds(self) -> Histogram:
        """A metric that is made on its first use, perhaps never."""
        if self.late is None:
            self.late = Histogram("late", "-", ["x"], registry=self.registry, buckets=self.bounds)
        return self.late


def samples(source: Any) -> dict[Key, float]:
    found = {}
    for family in source.collect():
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found[sample.name, *sample.labels.values()] = sample.value
    return found


class Prometheus:
    """Counts as `increase` over raw samples does: positive steps, a fall is a reset, a first value counts whole."""

    def __init__(self) -> None:
        self.counted: dict[tuple[int, Key], float] = defaultdict(float)
        self.last: dict[tuple[int, Key], float] = {}

    def scrape(self, slot: int, page: dict[Key, float]) -> None:
        for key, value in page.items():
            before = self.last.get((slot, key), 0.0)
            self.counted[slot, key] += value - before if value >= before else value
            self.last[slot, key] = value


class Slots(RuleBasedStateMachine):
    """Three slots, two Prometheus servers."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.now = 1_000_000.0
        self.live: dict[int, Worker] = {}
        self.ended: list[Worker] = []
        self.shown: dict[int, dict[Key, float]] = {slot: {} for slot in SLOTS}
        self.used: dict[int, dict[Key, float]] = {slot: {} for slot in SLOTS}
        self.truth: dict[tuple[int, Key], float] = defaultdict(float)
        self.disturbed: set[tuple[int, Key]] = set()
        self.servers = [Prometheus(), Prometheus()]

    def teardown(self) -> None:
        for worker in [*self.live.values(), *self.ended]:
            worker.close()
        self.directory.cleanup()

    @initialize()
    def begin(self) -> None:
        self.start(None, BUCKETS[0])
        self.start("a", BUCKETS[0])

    def workers(self) -> list[Worker]:
        return list(self.live.values())

    def add(self, worker: Worker, key: Key, amount: float) -> None:
        shown = self.shown[worker.slot]
        shown[key] = shown.get(key, 0.0) + amount
        worker.own[key] += amount
        self.truth[worker.slot, key] += amount

    def born(self, worker: Worker, *keys: Key) -> None:
        for key in keys:
            self.add(worker, key, 0.0)
            self.used[worker.slot][key] = float("inf")

    def gone(self, worker: Worker, label: str | None) -> None:
        """The application has removed hits of that label, or all."""
        for key in list(self.shown[worker.slot]):
            if key[0] == "hits_total" and label in {None, key[1]}:
                del self.shown[worker.slot][key]
                self.disturbed.add((worker.slot, key))
                worker.own.pop(key, None)

    @precondition(lambda self: len(self.live) < len(SLOTS))
    @rule(early=LABELS | st.none(), bounds=st.sampled_from(BUCKETS))
    def start(self, early: str | None, bounds: tuple[float, ...]) -> None:
        slot = min(set(SLOTS) - set(self.live))
        worker = Worker(Path(self.directory.name, f"{slot}"), slot, now=self.now, bounds=bounds)
        if early is not None:
            worker.hits.labels(early).inc(2)
        for key, used in list(self.used[slot].items()):
            self.used[slot][key] = min(used, self.now)
            if self.now - self.used[slot][key] > KEEP:
                del self.used[slot][key], self.shown[slot][key]
                self.disturbed.add((slot, key))
        worker.open()
        self.live[slot] = worker
        self.born(worker, ("plain_total",))
        if early is not None:
            self.born(worker, ("hits_total", early))
            self.add(worker, ("hits_total", early), 2.0)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), label=LABELS, amount=st.integers(0, 9))
    def inc(self, data: Any, label: str, amount: int) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        worker.hits.labels(label).inc(amount)
        self.born(worker, ("hits_total", label))
        self.add(worker, ("hits_total", label), amount)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), amount=st.integers(0, 9))
    def inc_plain(self, data: Any, amount: int) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        worker.plain.inc(amount)
        self.add(worker, ("plain_total",), amount)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), label=LABELS, value=st.integers(0, 9))
    def observe(self, data: Any, label: str, value: int) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        bounds = (*worker.bounds, float("inf"))
        names = [str(bound).replace("inf", "+Inf") for bound in bounds]
        if worker.late is None:
            self.rebucketed(worker, names)
        worker.seconds().labels(label).observe(value)
        buckets: list[Key] = [("late_bucket", label, name) for name in names]
        self.born(worker, *buckets, ("late_count", label), ("late_sum", label))
        for key, bound in zip(buckets, bounds, strict=True):
            self.add(worker, key, float(value <= bound))
        self.add(worker, ("late_count", label), 1.0)
        self.add(worker, ("late_sum", label), value)

    def rebucketed(self, worker: Worker, names: list[str]) -> None:
        """Its first use tells that the buckets are others: what there was is gone."""
        shown = self.shown[worker.slot]
        if {key[2] for key in shown if key[0] == "late_bucket"} - set(names):
            for key in [key for key in shown if key[0].startswith("late")]:
                del shown[key], self.used[worker.slot][key]
                self.disturbed.add((worker.slot, key))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), label=LABELS | st.none())
    def remove(self, data: Any, label: str | None) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        if label is None:
            worker.hits.clear()
        else:
            worker.hits.remove(label)
        self.gone(worker, label)
        for key in [key for key in self.used[worker.slot] if key not in self.shown[worker.slot]]:
            del self.used[worker.slot][key]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def reset(self, data: Any) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        worker.plain.reset()
        self.shown[worker.slot]["plain_total",] = worker.own["plain_total",] = 0.0
        self.disturbed.add((worker.slot, ("plain_total",)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), server=st.integers(0, 1))
    def scrape(self, data: Any, server: int) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        self.servers[server].scrape(worker.slot, samples(worker.continued))
        for (slot, key), truth in self.truth.items():
            if slot == worker.slot and (slot, key) not in self.disturbed:
                assert self.servers[server].counted[slot, key] == truth

    @precondition(lambda self: self.live)
    @rule(data=st.data(), clean=st.booleans())
    def end(self, data: Any, *, clean: bool) -> None:
        worker = data.draw(st.sampled_from(self.workers()))
        del self.live[worker.slot]
        self.ended.append(worker)
        if clean:
            worker.continued.close()
            assert samples(worker.registry).items() >= dict(worker.own).items()
        else:
            worker.hits.labels("a").inc(0)  # what a thread does that dies a moment later
            self.born(worker, ("hits_total", "a"))

    @rule(seconds=st.sampled_from([1.0, KEEP / 2, KEEP + 1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def pages_are_right(self) -> None:
        """Each live worker's page is what its slot counted, its registry what it counted itself."""
        for slot, worker in self.live.items():
            assert samples(worker.continued) == self.shown[slot]
            assert samples(worker.registry) == {key: own for key, own in worker.own.items() if key in self.shown[slot]}

    @invariant()
    def all_is_counted(self) -> None:
        """What a server counted and what it has not seen yet is the truth."""
        for server in self.servers:
            for (slot, key), truth in self.truth.items():
                if (slot, key) not in self.disturbed:
                    unscraped = self.shown[slot][key] - server.last.get((slot, key), 0.0)
                    assert server.counted[slot, key] + unscraped == truth


class TestModel(Slots.TestCase):  # type: ignore[misc,valid-type]  # made by hypothesis
    """As hypothesis runs it."""

    settings: ClassVar[settings] = settings(max_examples=150, stateful_step_count=40)

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger, "SIZE", 2**20)
