"""Any order of counting, scrapes, ends, starts, adoption: what Prometheus models counted, and the rest, is the truth.

Virtual workers share a directory, its locks, ledgers and the caretaker's adoption, which are real. A killed one is a
registry that nobody asks any more, as the kernel keeps what it wrote. The truth is kept by hand: what was counted in a
slot, less what the application itself removed or reset. The rest is what the page or the ledger of a slot shows, and a
server has not seen.
"""

import asyncio
import tempfile
from collections import defaultdict
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry, Counter, Histogram

from consul_prom.ledger import file as ledger_file
from consul_prom.ledger.file import KEEP, Ledger, ledger_path, read
from consul_prom.ledger.registry import LedgerRegistry, last_page
from consul_prom.slots import slots
from consul_prom.slots.slots import Slot
from consul_prom.worker import adoption
from consul_prom.worker.adoption import Adoption

MOST: Final = 3
"""Workers; while they are reloaded there are twice as many."""
RETAIN: Final = 120.0
DEAD: Final = "1 another.boot.0"
"""What a lock file says of a process that is gone."""
LABELS = st.sampled_from(["a", "b", "é\0"])
BUCKETS = [(1.0, 5.0), (2.0, 5.0)]
Key = tuple[str, ...]


class Worker:
    """A generation of a slot; `made` before its ledger is opened, as metrics are at import."""

    def __init__(self, held: Slot, *, now: float, bounds: tuple[float, ...]) -> None:
        self.held, self.slot = held, held.number
        self.bounds = bounds
        self.registry = CollectorRegistry()
        self.hits = Counter("hits", "-", ["x"], registry=self.registry)
        self.plain = Counter("plain", "-", registry=self.registry)
        self.late: Histogram | None = None
        self.own: dict[Key, float] = defaultdict(float)
        self._now = now

    def open(self) -> None:
        path = ledger_path(self.held.directory, "shop", self.slot)
        book = Ledger.take_over(path, boot=self.held.boot, instance=f"web-1:{self.slot}", now=self._now)
        self.continued = LedgerRegistry(self.registry, book)
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


class Leader:
    """What a worker does for the slots that have none, until its end."""

    def __init__(self, worker: Worker, machine: "Slots") -> None:
        self.worker = worker
        self.ends = False
        self._machine = machine
        self._adoption = Adoption(
            worker.held.directory,
            "shop",
            host="web-1",
            retain=RETAIN,
            patience=1,
            serve=self._serve,
            complete=lambda _inhabited: self._complete,
            clock=lambda: machine.now,
        )

    async def turn(self, *, complete: bool) -> None:
        self._complete = complete
        await asyncio.sleep(2 * adoption.GLANCE)  # whose time is over has gone by then
        await self._adoption.turn()

    async def end(self, *, clean: bool) -> None:
        self.ends = True
        if clean:
            await self._adoption.end()
            return
        self._machine.served.clear()  # its sockets have closed
        for number in self._adoption._adopted:
            slots.path_of(self.worker.held.directory, "shop", number).write_text(f"{DEAD} adopted", encoding="ascii")
        tasks = list(self._adoption._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, slot: Slot, page: CollectorRegistry, _port: int) -> "ServedTarget":
        guest = self._machine.served[slot.number] = ServedTarget(self, slot.number, page, self._machine)
        self._machine.adopted_at.setdefault(slot.number, self._machine.now)
        return guest


class ServedTarget:
    """A page of a slot that the caretaker serves: a target."""

    def __init__(self, caretaker: Leader, slot: int, page: CollectorRegistry, machine: "Slots") -> None:
        self.page = page
        self._caretaker, self._slot, self._machine = caretaker, slot, machine

    async def give_up(self) -> None:
        del self._machine.served[self._slot]

    async def retire(self, _timeout: float) -> bool:
        """The entry goes, which it shall not where a newborn needs it."""
        assert self._caretaker.ends or self._machine.is_over(self._slot)
        await self.give_up()
        return True


class Slots(RuleBasedStateMachine):
    """As many slots as it takes, two Prometheus servers."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.directory = Path(self.folder.name)
        self.loop = asyncio.new_event_loop()
        self.now = 1_000_000.0
        self.live: dict[int, Worker] = {}  # the eldest first
        self.ended: list[Worker] = []
        self.caretaker: Leader | None = None
        self.served: dict[int, ServedTarget] = {}
        self.adopted_at: dict[int, float] = {}
        self.shown: dict[int, dict[Key, float]] = defaultdict(dict)
        self.used: dict[int, dict[Key, float]] = defaultdict(dict)
        self.truth: dict[tuple[int, Key], float] = defaultdict(float)
        self.disturbed: set[tuple[int, Key]] = set()
        self.servers = [Prometheus(), Prometheus()]

    def teardown(self) -> None:
        if self.caretaker:
            self.wait_for(self.caretaker.end(clean=True))
        for worker in [*self.live.values(), *self.ended]:
            worker.close()
            worker.held.release()
        self.wait_for(self.loop.shutdown_default_executor())
        self.loop.close()
        self.folder.cleanup()

    def wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Meanwhile the caretaker is at work."""
        return self.loop.run_until_complete(coroutine)

    @initialize()
    def begin(self) -> None:
        self.start(None, BUCKETS[0])
        self.start("a", BUCKETS[0])

    def workers(self) -> list[Worker]:
        return list(self.live.values())

    def page(self, slot: int) -> dict[Key, float]:
        """What a scrape of a target shows; of a slot that is none, what is in its ledger."""
        if slot in self.live:
            return samples(self.live[slot].continued)
        if slot in self.served:
            return samples(self.served[slot].page)
        contents = read(ledger_path(self.directory, "shop", slot))
        assert contents
        return samples(last_page(contents))

    def is_over(self, slot: int) -> bool:
        """Whether its last page was served for long enough."""
        return slot in self.adopted_at and self.now - self.adopted_at[slot] >= RETAIN

    def newborn(self) -> Slot:
        """The smallest slot that has no worker, adopted or not; who adopted it does not serve it any more."""
        slot: Slot = self.wait_for(asyncio.to_thread(slots.acquire, self.directory, "shop"))
        assert slot.number == min(set(range(2 * MOST)) - set(self.live))
        assert slot.number not in self.served
        return slot

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

    @precondition(lambda self: len(self.live) < MOST)
    @rule(early=LABELS | st.none(), bounds=st.sampled_from(BUCKETS))
    def start(self, early: str | None, bounds: tuple[float, ...]) -> None:
        worker = Worker(self.newborn(), now=self.now, bounds=bounds)
        slot = worker.slot
        if early is not None:
            worker.hits.labels(early).inc(2)
        for key, used in list(self.used[slot].items()):
            self.used[slot][key] = min(used, self.now)
            if self.now - self.used[slot][key] > KEEP:
                del self.used[slot][key], self.shown[slot][key]
                self.disturbed.add((slot, key))
        worker.open()
        self.live[slot] = worker
        self.adopted_at.pop(slot, None)
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

    @precondition(lambda self: self.live or self.served)
    @rule(data=st.data(), server=st.integers(0, 1))
    def scrape(self, data: Any, server: int) -> None:
        target = data.draw(st.sampled_from([*self.live, *self.served]))
        self.servers[server].scrape(target, self.page(target))
        for (slot, key), truth in self.truth.items():
            if slot == target and (slot, key) not in self.disturbed:
                assert self.servers[server].counted[slot, key] == truth

    @precondition(lambda self: self.live)
    @rule(data=st.data(), clean=st.booleans())
    def end(self, data: Any, *, clean: bool) -> None:
        self.leave(data.draw(st.sampled_from(self.workers())), clean=clean)

    def leave(self, worker: Worker, *, clean: bool) -> None:
        del self.live[worker.slot]
        self.ended.append(worker)
        if self.caretaker and self.caretaker.worker is worker:
            self.wait_for(self.caretaker.end(clean=clean))
            self.caretaker = None
            assert not self.served
        if clean:
            worker.continued.close()
            assert samples(worker.registry).items() >= dict(worker.own).items()
            worker.held.settle()
        else:
            worker.hits.labels("a").inc(0)  # what a thread does that dies a moment later
            self.born(worker, ("hits_total", "a"))
            self.kill(worker.held)
        worker.held.release()

    def kill(self, slot: Slot) -> None:
        """What the system would tell of its holder."""
        Path(slot.lock.lock_file).write_text(DEAD, encoding="ascii")

    @rule()
    def stillborn(self) -> None:
        """One is killed that has its slot and has not opened the ledger."""
        slot = self.newborn()
        self.kill(slot)
        slot.release()

    @precondition(lambda self: self.live)
    @rule(clean=st.booleans(), bounds=st.sampled_from(BUCKETS))
    def reload(self, *, clean: bool, bounds: tuple[float, ...]) -> None:
        """Others start in other slots, and then all that there were end."""
        before = self.workers()
        for _ in before:
            self.start("a", bounds)
        for worker in before:
            self.leave(worker, clean=clean)

    @precondition(lambda self: self.live)
    @rule(workers=st.integers(1, MOST))
    def scale(self, workers: int) -> None:
        """The eldest end where there are too many, as Gunicorn has it."""
        while len(self.live) < workers:
            self.start(None, BUCKETS[0])
        while len(self.live) > workers:
            self.leave(self.workers()[0], clean=True)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), complete=st.booleans())
    def look_after(self, data: Any, *, complete: bool) -> None:
        """The caretaker's turn; where nobody is on the way, it serves each vacant slot, for as long as RETAIN."""
        if not self.caretaker:
            self.caretaker = Leader(data.draw(st.sampled_from(self.workers())), self)
        self.wait_for(self.caretaker.turn(complete=complete))
        vacant = {slot for slot in self.shown if slot not in self.live and not self.is_over(slot)}
        assert self.served.keys() == vacant if complete else self.served.keys() <= vacant

    @rule(seconds=st.sampled_from([1.0, adoption.BOOTING, RETAIN, KEEP / 2, KEEP + 1]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def pages_are_right(self) -> None:
        """Each slot shows what was counted in it, whoever shows it, and a worker's registry what it counted itself."""
        for slot, shown in self.shown.items():
            assert self.page(slot) == shown
        for slot, worker in self.live.items():
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

    settings: ClassVar[settings] = settings(max_examples=settings().max_examples // 3, stateful_step_count=40)

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger_file, "SIZE", 2**20)
        monkeypatch.setattr(adoption, "GLANCE", 0.001)
        monkeypatch.setattr(slots, "PATIENCE", 2.0)
