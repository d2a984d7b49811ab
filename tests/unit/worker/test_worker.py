"""The worker as a whole: one process, its slot, its endpoint and its entry."""

import asyncio
import contextlib
import errno
import http.client
import importlib
import itertools
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.values import MutexValue

import consul_prom
from consul_prom.devagent import DevAgent, Fault
from consul_prom.errors import ConsulPromError, EndpointError, SettingsError
from consul_prom.gunicorn.stats import MasterStats
from consul_prom.ledger.file import Ledger
from consul_prom.process.fork import FORK_LOCK
from consul_prom.server.bind import route_address
from consul_prom.slots import directory as slot_directories
from consul_prom.slots import slots
from consul_prom.slots.directory import prepare
from consul_prom.worker.runtime import WorkerRuntime
from consul_prom.worker.worker import Worker
from tests.services.program import own_address
from tests.services.waiting import wait_until

Make = Callable[..., Worker]
FORKS = 50


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "slots"


@pytest.fixture
def make(agent: DevAgent, registry: CollectorRegistry, directory: Path) -> Iterator[Make]:
    """Workers of the service shop that are stopped in the end."""
    made = []

    def make(**arguments: Any) -> Worker:
        defaults = {"service": "shop", "host": "web-1", "consul_http_addr": agent.url, "dir": directory}
        made.append(Worker(**{"registry": registry, **defaults, **arguments}))
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


def registered(worker: Worker) -> Worker:
    wait_until(lambda: worker.registered, within=10, what="registered")
    return worker


def nothing(worker: Worker) -> bool:
    """Whether the worker has not started, or no longer runs."""
    return {worker.slot, worker.instance, worker.url} == {None} and not worker.registered


def page(worker: Worker) -> str:
    assert worker.url
    with urllib.request.urlopen(worker.url, timeout=5) as answer:
        return str(answer.read().decode())


def left_over(caplog: pytest.LogCaptureFixture) -> list[str]:
    """On a busy machine the thread's own end may take too long, too, which is another line."""
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [line for line in lines if "may still be registered" in line]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name == "consul-prom"}


def test_life(agent: DevAgent, make: Make, registry: CollectorRegistry, directory: Path) -> None:
    """A worker serves and registers, and leaves neither entry, thread, slot nor metric behind."""
    before = set(registry.collect())
    worker = make(tags="v1", meta={"team": "a"})
    assert nothing(worker)
    worker.start()
    worker.start()
    assert (worker.slot, worker.instance) == (0, "web-1:0")
    registered(worker)
    entry = agent.state.services["shop.web-1.0"]
    assert "consul_prom_registered 1.0" in page(worker)
    assert 'consul_prom_registrations_total{reason="start"} 1.0' in page(worker)
    assert repr(worker) == f"<Worker web-1:0 url={worker.url} registered=True>"
    assert worker.url == f"http://127.0.0.1:{entry.port}/metrics"
    worker.stop()
    worker.stop()
    assert nothing(worker)
    assert not agent.state.services
    assert not threads()
    assert set(registry.collect()) == before
    slot = slots.try_slot(directory, "shop", 0)
    assert slot
    slot.release()


def test_again(agent: DevAgent, make: Make) -> None:
    """A stopped worker may start again."""
    worker = make()
    for _ in range(2):
        worker.start()
        registered(worker)
        worker.stop()
        assert not agent.state.services


def test_shared(agent: DevAgent, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Workers of one process and registry, of two adapters say, are one target until the last of them stops."""
    first, second, third = make(), make(), make(service="other")
    for worker in (first, second, third):
        worker.start()
    registered(first)
    assert {worker.url for worker in (first, second, third)} == {first.url}
    assert list(agent.state.services) == ["shop.web-1.0"]
    assert "registered as 'shop' already; service='other' is not used" in caplog.text
    first.stop()
    third.stop()
    assert registered(second).slot == 0
    second.stop()
    assert not agent.state.services


def test_running(agent: DevAgent, registry: CollectorRegistry, directory: Path) -> None:
    """A script is a target for as long as the context lasts, however it ends."""

    def script() -> None:
        with consul_prom.running(
            service="nightly", host="web-1", consul_http_addr=agent.url, dir=directory, registry=registry, linger=0
        ) as worker:
            assert registered(worker).instance == "web-1:0"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        script()
    assert not agent.state.services
    assert not list(registry.collect())


class TestLinger:
    """An end that waits for a scrape."""

    @pytest.fixture
    def hits(self, registry: CollectorRegistry) -> Counter:
        return Counter("hits", "-", registry=registry)

    @pytest.fixture(autouse=True)
    def _lines(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)

    def test_job(
        self,
        agent: DevAgent,
        registry: CollectorRegistry,
        directory: Path,
        hits: Counter,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A job is a target until it has been scraped once more, by each server that keeps a connection."""
        shown: list[str] = []

        def scrape_twice(worker: Worker) -> None:
            assert worker.url
            with contextlib.closing(http.client.HTTPConnection(worker.url.split("/")[2])) as connection:
                connection.request("GET", "/metrics")
                shown.append(connection.getresponse().read().decode())
                assert over.wait(20)
                time.sleep(0.1)
                page(worker)  # somebody else's, who keeps no connection
                time.sleep(0.1)
                assert worker.registered
                connection.request("GET", "/metrics")
                shown.append(connection.getresponse().read().decode())

        over = threading.Event()
        with (
            ThreadPoolExecutor() as pool,
            consul_prom.running(
                service="nightly", host="web-1", consul_http_addr=agent.url, dir=directory, registry=registry
            ) as worker,
        ):
            registered(worker)
            scraping = pool.submit(scrape_twice, worker)
            wait_until(lambda: shown, within=10, what="a first scrape")
            hits.inc()
            over.set()
        scraping.result(10)
        assert ["hits_total 1.0" in text for text in shown] == [False, True]
        assert not agent.state.services
        assert "has counted since its last scrape" not in caplog.text

    def test_not_told_to(
        self, make: Make, hits: Counter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker that no signal ends does not wait; what nobody has scraped is said in one line, and saved."""
        monkeypatch.setattr("consul_prom.worker.runtime.await_scrape", lambda *_, **__: pytest.fail("it waits"))
        worker = make(address="127.0.0.1", linger=600)
        worker.start()
        registered(worker)
        page(worker)
        hits.inc(3)
        worker.stop()
        (line,) = [record.message for record in caplog.records if "CONSUL_PROM_LINGER" in record.message]
        assert line.startswith("web-1:0 has counted since its last scrape; that is in its ledger")
        registry = CollectorRegistry()
        again = make(registry=registry, address="127.0.0.1")
        again.start()
        assert "hits_total 3.0" in page(again)

    def test_signal(self, make: Make, hits: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that a signal ends waits, on its own endpoint; with LINGER alone are the handlers touched."""
        theirs = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            before = signal.getsignal(signal.SIGTERM)
            make(registry=CollectorRegistry(), address="127.0.0.1").start()
            assert signal.getsignal(signal.SIGTERM) is before
            worker = make(address="127.0.0.1", linger=600)
            worker.start()
            registered(worker)
            signal.raise_signal(signal.SIGTERM)
            asyncio.run(worker.leave())
            assert worker.registered
            hits.inc()
            seen: list[str] = []
            timer = threading.Timer(0.1, lambda: seen.append(page(worker)))
            timer.start()
            worker.stop()
            assert "hits_total 1.0" in seen[0]
            assert signal.getsignal(signal.SIGTERM) is before
        finally:
            signal.signal(signal.SIGTERM, theirs)

    def test_interrupted(self, agent: DevAgent, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who does not want to wait presses Ctrl-C, and it ends as cleanly."""

        def press(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("consul_prom.worker.runtime.await_scrape", press)
        worker = make(address="127.0.0.1")
        worker.start()
        registered(worker)
        with pytest.raises(KeyboardInterrupt):
            worker.stop(linger=600)
        assert not agent.state.services

    def test_brief(self, agent: DevAgent, make: Make, hits: Counter) -> None:
        """A job that is over before it is registered waits for both."""
        agent.fault = Fault(path="/v1/agent/service", delay=0.3)
        worker = make(address="127.0.0.1", stop_timeout=10)
        worker.start()
        hits.inc()
        seen: list[str] = []

        def scrape() -> None:
            registered(worker)
            seen.append(page(worker))

        with ThreadPoolExecutor() as pool:
            scraping = pool.submit(scrape)
            worker.stop(linger=600)
            scraping.result(20)
        assert "hits_total 1.0" in seen[0]

    def test_silent_agent(self, agent: DevAgent, make: Make) -> None:
        """Of an agent that does not answer it waits for STOP_TIMEOUT."""
        agent.fault = Fault(delay=600)
        worker = make(address="127.0.0.1", stop_timeout=0.2)
        worker.start()
        worker.stop(linger=600)

    def test_unregistered(self, agent: DevAgent, make: Make) -> None:
        """Nobody comes to what is not registered, and so it waits for nobody."""
        agent.fault = Fault(status=500)
        worker = make(address="127.0.0.1")
        worker.start()
        worker.stop(linger=600)


def test_slots(agent: DevAgent, make: Make) -> None:
    """Two workers of a directory have two slots, and the next one has the smallest that is free."""
    one, two = (make(registry=CollectorRegistry()) for _ in range(2))
    one.start()
    two.start()
    assert (one.slot, two.slot) == (0, 1)
    one.stop()
    three = make(registry=CollectorRegistry())
    three.start()
    assert three.slot == 0


class TestAddress:
    """Where the endpoint listens and what the entry says."""

    def test_set(self, make: Make) -> None:
        """With ADDRESS or PORT set, the endpoint is bound when start returns."""
        worker = make(address="127.0.0.3")
        worker.start()
        assert worker.url
        assert worker.url.startswith("http://127.0.0.3:")

    def test_port(self, make: Make) -> None:
        """With PORT alone, the default route's address is bound when start returns."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        worker = make(port=port)
        worker.start()
        assert worker.url == f"http://{route_address()}:{port}/metrics"

    def test_advertised(self, make: Make) -> None:
        """Without either, it is what the agent advertises, loopback included."""
        worker = make()
        worker.start()
        wait_until(lambda: worker.url, within=10, what="an address")
        assert str(worker.url).startswith("http://127.0.0.1:")

    @pytest.mark.parametrize(
        "fault",
        [
            Fault(path="/v1/agent/self", status=403, body="Permission denied"),
            Fault(path="/v1/agent/self", status=200, body='{"Member": {"Addr": "203.0.113.77"}}'),
            Fault(path="/v1/agent/self", status=200, body='{"Member": {}}'),
            Fault(path="/v1/agent/self", status=500, body="rpc error"),
            Fault(path="/v1/agent/self", hang=True),
        ],
        ids=["denied", "not ours", "not told", "failing", "hanging"],
    )
    def test_route(self, agent: DevAgent, make: Make, fault: Fault) -> None:
        """Where the agent does not tell an address of ours, it is the default route's."""
        agent.fault = fault
        worker = make()
        worker.start()
        registered(worker)
        assert str(worker.url).startswith(f"http://{route_address()}:")

    def test_no_route(
        self, agent: DevAgent, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With neither, the worker waits for the agent, says so once, and never takes loopback by itself."""
        monkeypatch.setattr("consul_prom.server.bind.route_address", lambda: None)
        monkeypatch.setattr("consul_prom.server.bind.ASK_AGENT", 0.1)
        agent.fault = Fault(path="/v1/agent/self", status=500)
        worker = make()
        worker.start()
        wait_until(lambda: caplog.records, within=10, what="a warning")
        assert worker.url is None
        agent.fault = None
        registered(worker)
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            "neither the agent nor a default route tells our address: set CONSUL_PROM_ADDRESS",
            "the agent tells our address",
        ]

    def test_bind(self, agent: DevAgent, make: Make) -> None:
        """BIND is where it listens and ADDRESS what it says, for an address that is translated to ours."""
        worker = make(address="203.0.113.9", bind="127.0.0.4")
        worker.start()
        registered(worker)
        entry = agent.state.services["shop.web-1.0"]
        assert worker.url == f"http://203.0.113.9:{entry.port}/metrics"
        with socket.create_connection(("127.0.0.4", entry.port), timeout=5):
            pass

    def test_ipv6(self, agent: DevAgent, make: Make) -> None:
        """An IPv6 address is bracketed where it must be."""
        worker = make(address="::1")
        worker.start()
        registered(worker)
        assert agent.state.services["shop.web-1.0"].address == "::1"
        assert "consul_prom_registered" in page(worker)


class TestPassingTrouble:
    """A failure that may pass is retried as the agent is: one WARNING, and one when it is over."""

    def passes(self, worker: Worker, end: Callable[[], object], words: str, caplog: pytest.LogCaptureFixture) -> None:
        """Start a *worker* that cannot start for the reason in *words*, until *end* ends that."""
        caplog.set_level(logging.INFO)
        worker.start()
        warning = f"Cannot serve shop: {words}. Retrying."
        wait_until(lambda: warning in caplog.text, within=10, what="the warning")
        assert worker.url is None
        assert not worker.registered
        end()
        registered(worker)
        assert page(worker)
        levels = [record.levelname for record in caplog.records if record.name.startswith("consul_prom")]
        assert (levels.count("WARNING"), levels.count("ERROR")) == (2, 0)
        assert "shop can be served again" in caplog.text

    def test_directory(self, make: Make, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A directory that cannot be used when the worker starts."""
        directory.touch()
        worker = make()
        words = f"CONSUL_PROM_DIR={str(directory)!r} is not a directory"
        self.passes(worker, directory.unlink, words, caplog)
        assert (worker.slot, worker.instance) == (0, "web-1:0")

    def test_full_disk(
        self, make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A disk that is full when the worker starts; what it counts meanwhile is in its ledger afterwards."""

        def full(_directory: Path) -> str:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(slot_directories, "_new_id", full)
        registry = CollectorRegistry()
        worker, hits = make(registry=registry), Counter("hits", "-", registry=registry)
        words = f"CONSUL_PROM_DIR={str(directory)!r} cannot be used: No space left on device"

        def end() -> None:
            assert worker.slot is None
            hits.inc(3)
            monkeypatch.undo()

        self.passes(worker, end, words, caplog)
        hits.inc(4)
        assert "hits_total 7.0" in page(worker)
        worker.stop()
        again = CollectorRegistry()
        Counter("hits", "-", registry=again)
        successor = make(registry=again, address="127.0.0.1")
        successor.start()
        assert "hits_total 7.0" in page(successor)

    def test_port(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        """A port that somebody else has for a moment."""
        taken = socket.create_server(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        words = f"port {port} is taken on 127.0.0.1: set CONSUL_PROM_PORT to others, or to 0"
        worker = make(address="127.0.0.1", port=port)
        self.passes(worker, taken.close, words, caplog)
        assert worker.url == f"http://127.0.0.1:{port}/metrics"

    @pytest.mark.parametrize(
        ("setting", "words"),
        [
            ({"address": "203.0.113.9"}, "203.0.113.9 is no address of this host"),
            ({"dir": "/proc/none"}, "CONSUL_PROM_DIR='/proc/none' cannot be used"),
        ],
        ids=["address", "directory"],
    )
    def test_required(self, make: Make, registry: CollectorRegistry, setting: dict[str, str], words: str) -> None:
        """REQUIRED raises after START_TIMEOUT, says the cause, and undoes the start."""
        worker = make(required=True, start_timeout=0.3, **setting)
        with pytest.raises(EndpointError, match=f"not registered within CONSUL_PROM_START_TIMEOUT: {words}"):
            worker.start()
        assert nothing(worker)
        assert not list(registry.collect())
        assert not threads()

    def test_stopped_meanwhile(self, make: Make, directory: Path, registry: CollectorRegistry) -> None:
        """A worker that is stopped before it has a slot leaves nothing behind."""
        directory.touch()
        worker = make(linger=5)
        worker.start()
        worker.stop()
        assert nothing(worker)
        assert not list(registry.collect())
        assert not threads()

    def test_unreadable_directory(
        self,
        agent: DevAgent,
        make: Make,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A worker stays registered while its directory cannot be read: it holds its lock, and loses no count."""
        monkeypatch.setattr("consul_prom.consul.registrar.TURN", 0.05)
        worker = make(address="127.0.0.1")
        worker.start()
        registered(worker)
        looks, lstat = itertools.count(), Path.lstat

        def refuse(path: Path) -> os.stat_result:
            if path.parent == directory:
                next(looks)
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return lstat(path)

        monkeypatch.setattr(Path, "lstat", refuse)
        wait_until(lambda: next(looks) > 20, within=20, what="some turns")
        assert worker.registered
        assert "gives up its slot" not in caplog.text

    def test_wiped_and_not_usable(
        self, make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker whose directory was replaced by one that cannot be used takes a slot as soon as it can be."""
        monkeypatch.setattr("consul_prom.consul.registrar.TURN", 0.05)
        worker = make(address="127.0.0.1")
        worker.start()
        registered(worker)
        shutil.rmtree(directory)
        directory.touch()
        wait_until(lambda: "is not a directory. Retrying." in caplog.text, within=20, what="a warning")
        assert not worker.registered
        directory.unlink()
        registered(worker)


class TestTrouble:
    """What goes wrong is one ERROR line, and the application goes on; with REQUIRED it raises."""

    @pytest.fixture(params=[False, True], ids=["optional", "required"])
    def fails(
        self, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, registry: CollectorRegistry
    ) -> Callable[[Callable[..., Worker], str], None]:
        """Start a worker that cannot start, for the reason in *words*."""

        def check(make: Callable[..., Worker], words: str) -> None:
            worker = make(required=request.param, start_timeout=5)
            with pytest.raises(ConsulPromError, match=words) if request.param else nullcontext():
                worker.start()
            wait_until(lambda: not worker._life or worker._life.failure, within=10, what="the failure")
            errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
            assert len(errors) == (0 if request.param else 1), errors
            assert request.param or (errors[0].startswith("consul-prom is off: ") and words in errors[0])
            assert nothing(worker)
            assert not list(registry.collect())
            worker.stop()
            assert not threads()

        return check

    def test_no_service(self, make: Make, fails: Callable[..., None]) -> None:
        """No service name."""
        fails(lambda **more: make(service=None, **more), "no service name: pass service=... or set CONSUL_PROM_SERVICE")

    def test_multiprocess_mode(self, make: Make, fails: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        """prometheus_client's own multiprocess mode."""
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/somewhere")
        fails(make, "PROMETHEUS_MULTIPROC_DIR='/somewhere'")

    def test_thread(self, make: Make, fails: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        """A system that gives no thread."""

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            fails(make, "can't start new thread")

    def test_environment(self, make: Make, fails: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        """A wrong setting in the environment."""
        monkeypatch.setenv("CONSUL_PROM_PORT", "many")
        fails(make, "CONSUL_PROM_PORT='many'")

    def test_unexpected(self, make: Make, fails: Callable[..., None]) -> None:
        """What nobody thought of, as a registry of the application's own that takes no metric."""

        class Full(CollectorRegistry):
            def register(self, collector: Collector) -> None:
                raise RuntimeError("no more metrics")

        fails(lambda **more: make(registry=Full(), **more), "did not expect")
        other = make()
        other.start()
        assert other.slot == 0

    def test_unexpected_in_thread(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What nobody thought of in the metrics thread gives all up there too; the traceback is in the log."""
        monkeypatch.delattr("consul_prom.worker.runtime.find_address")
        worker = make()
        worker.start()
        wait_until(lambda: worker._life and worker._life.failure, within=10, what="the failure")
        (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert record.getMessage() == "consul-prom is off: an error that it did not expect"
        assert record.exc_info
        assert nothing(worker)

    def test_names(self, make: Make, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
        """An application that has a metric of our names is left alone."""
        Gauge("consul_prom_registered", "The application's own.", registry=registry)
        worker = make()
        worker.start()
        assert "the application has metrics of our names" in caplog.text
        assert nothing(worker)
        assert len(list(registry.collect())) == 1
        other = make(registry=CollectorRegistry())
        other.start()
        assert other.slot == 0

    def test_argument(self, make: Make) -> None:
        """A wrong argument raises at once, required or not."""
        with pytest.raises(SettingsError, match="service='Shop'"):
            make(service="Shop")

    @pytest.mark.parametrize("setting", [{}, {"address": "127.0.0.1"}], ids=["asked", "set"])
    def test_required_and_refused(self, make: Make, setting: dict[str, str]) -> None:
        """REQUIRED says that the agent refused, also while the worker waits for the agent to tell the address."""
        with socket.socket() as closed:  # bound, and not listening
            closed.bind(("127.0.0.1", 0))
            agent = f"127.0.0.1:{closed.getsockname()[1]}"
            worker = make(required=True, start_timeout=1, consul_http_addr=agent, **setting)
            with pytest.raises(EndpointError, match=r"CONSUL_PROM_START_TIMEOUT: .*Connection refused"):
                worker.start()

    def test_required_without_agent(self, agent: DevAgent, make: Make, registry: CollectorRegistry) -> None:
        """REQUIRED raises when the agent does not answer within START_TIMEOUT, and undoes the start."""
        agent.fault = Fault(hang=True)
        worker = make(required=True, start_timeout=0.3, stop_timeout=0.5, address="127.0.0.1")
        with pytest.raises(EndpointError, match="not registered within CONSUL_PROM_START_TIMEOUT"):
            worker.start()
        assert not threads()
        assert not list(registry.collect())

    @pytest.mark.parametrize("how", ["argument", "text", "environment"])
    def test_required_and_misset(self, make: Make, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
        """REQUIRED raises for a wrong environment too, however it was set."""
        monkeypatch.setenv("CONSUL_PROM_PORT", "many")
        if how == "environment":
            monkeypatch.setenv("CONSUL_PROM_REQUIRED", "true")
        arguments: dict[str, dict[str, Any]] = {"argument": {"required": True}, "text": {"required": "true"}}
        worker = make(**arguments.get(how, {}))
        with pytest.raises(SettingsError, match="CONSUL_PROM_PORT='many'"):
            worker.start()

    def test_disabled_and_misset(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """DISABLED says nothing of what else is wrong."""
        monkeypatch.setenv("CONSUL_PROM_PORT", "many")
        monkeypatch.setenv("CONSUL_PROM_DISABLED", "1")
        worker = make()
        worker.start()
        assert nothing(worker)
        assert not caplog.records

    def test_disabled(self, agent: DevAgent, make: Make) -> None:
        """DISABLED starts nothing, and says nothing."""
        worker = make(disabled=True)
        worker.start()
        assert (worker.slot, threads(), list(agent.requests)) == (None, set(), [])


class TestAgentTrouble:
    """Consul cannot hold the worker up."""

    def test_absent(self, make: Make) -> None:
        """Without an agent the worker serves, and its stop is quick and says nothing, since there is nothing left."""
        worker = make(consul_http_addr="127.0.0.1:1", address="127.0.0.1")
        worker.start()
        assert "consul_prom_registered 0.0" in wait_until(lambda: page(worker), within=10, what="a page")
        worker.stop()

    def test_stop_while_it_hangs(
        self, agent: DevAgent, make: Make, directory: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An agent that hangs keeps the stop for STOP_TIMEOUT, one line says what is left over, and it can be swept."""
        worker = make(stop_timeout=0.3)
        worker.start()
        registered(worker)
        agent.fault = Fault(hang=True)
        worker.stop()
        wait_until(lambda: not threads(), within=5, what="the end of the thread")
        (line,) = left_over(caplog)
        assert line.startswith("shop.web-1.0 may still be registered: the agent did not answer within ")
        assert slots.abandoned(directory, "shop") == [0], "though the process lives"
        agent.fault = None

    @pytest.mark.parametrize("fault", [Fault(hang=True), None], ids=["it hangs", "it answers"])
    def test_noted_before_told(
        self, agent: DevAgent, make: Make, monkeypatch: pytest.MonkeyPatch, fault: Fault | None
    ) -> None:
        """A slot's file is written before the worker counts as gone, because its slot is released then."""
        worker, gone = make(stop_timeout=0.3 if fault else 100), list[bool]()
        worker.start()
        registered(worker)
        assert worker._life
        tenancy = worker._life.tenancy
        for name in ("abandon", "settle"):
            monkeypatch.setattr(slots.Slot, name, lambda _slot: gone.append(tenancy.left))
        agent.fault = fault
        worker.stop()
        assert gone == [False]
        agent.fault = None

    @pytest.mark.parametrize("under_way", [False, True], ids=["before", "under way"])
    def test_hurry(self, agent: DevAgent, make: Make, caplog: pytest.LogCaptureFixture, *, under_way: bool) -> None:
        """A stop for which there is less time than STOP_TIMEOUT, as may turn out while it waits, takes no more."""
        worker = make(stop_timeout=100)
        worker.start()
        registered(worker)
        agent.fault = Fault(hang=True)
        hurrying = threading.Timer(0.3 if under_way else 0, worker.hurry, [0.2])
        hurrying.start()
        if not under_way:
            hurrying.join()
        begun = time.monotonic()
        worker.stop()
        assert time.monotonic() - begun < 20
        assert left_over(caplog)
        hurrying.join()
        agent.fault = None

    def test_hurry_of_the_leader(
        self, agent: DevAgent, make: Make, directory: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A stop with less time than STOP_TIMEOUT says of the master's entry too that it may be left."""
        prepare(directory)
        tally = MasterStats(directory, "shop")
        worker = make(stop_timeout=100)
        worker.start()
        wait_until(lambda: len(agent.state.services) == 2, within=20, what="the worker's and the master's entry")
        agent.fault = Fault(hang=True)
        worker.hurry(0.5)
        worker.stop()
        wait_until(lambda: len(left_over(caplog)) == 2, within=20, what="both told")
        assert any("shop.web-1.master may still be registered" in line for line in left_over(caplog))
        agent.fault = None
        tally.close()

    async def test_hurry_while_it_leaves(self, agent: DevAgent, make: Make) -> None:
        """The same for a stop that begins in the application's loop."""
        worker = make(stop_timeout=100)
        worker.start()
        registered(worker)
        agent.fault = Fault(hang=True)
        asyncio.get_running_loop().call_later(0.3, worker.hurry, 0.2)
        async with asyncio.timeout(20):
            await worker.leave()
        worker.stop()
        agent.fault = None

    @pytest.mark.parametrize("fault", [None, Fault(status=403)], ids=["", "denied"])
    def test_stop_while_we_hang(
        self,
        agent: DevAgent,
        make: Make,
        registry: CollectorRegistry,
        caplog: pytest.LogCaptureFixture,
        fault: Fault | None,
    ) -> None:
        """A metrics thread that is stuck in a collector is deregistered without it, and does it no second time."""
        stuck, release = threading.Event(), threading.Event()

        class Stuck:
            def collect(self) -> Iterator[GaugeMetricFamily]:
                stuck.set()
                release.wait(20)
                yield GaugeMetricFamily("stuck", "A collector that takes its time.", 1)

            def describe(self) -> list[GaugeMetricFamily]:
                return []

        worker = make(stop_timeout=0.5)
        worker.start()
        registered(worker)
        registry.register(Stuck())
        scrape = threading.Thread(target=lambda: _quietly(worker))
        scrape.start()
        assert stuck.wait(5)
        agent.fault = fault
        worker.stop()
        assert bool(agent.state.services) == bool(fault)
        agent.requests.clear()
        release.set()
        scrape.join()
        wait_until(lambda: not threads(), within=5, what="the end of the thread")
        assert not [path for _, path in agent.requests if "shop.web-1.0" in path], "it may be a successor's by now"
        assert len(left_over(caplog)) == bool(fault)

    def test_wiped_directory_while_the_agent_fails(
        self, agent: DevAgent, make: Make, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A worker whose directory is wiped while the agent does not answer is registered again when it does."""
        monkeypatch.setattr("consul_prom.consul.registrar.TURN", 1)
        worker = make()
        worker.start()
        registered(worker)
        before = agent.state.services["shop.web-1.0"].meta["dir"]
        agent.fault = Fault(status=500)
        shutil.rmtree(directory)
        wait_until(lambda: not worker.registered, within=20, what="the failure noticed")
        agent.fault = None
        wait_until(
            lambda: worker.registered and agent.state.services["shop.web-1.0"].meta["dir"] != before,
            within=60,
            what="registered from the new directory",
        )

    async def test_leave_while_we_hang(self, agent: DevAgent, make: Make, registry: CollectorRegistry) -> None:
        """A collector that hangs does not hold the application's shutdown up for longer than STOP_TIMEOUT."""
        stuck, release = threading.Event(), threading.Event()

        class Stuck:
            def collect(self) -> Iterator[GaugeMetricFamily]:
                stuck.set()
                release.wait(60)
                yield GaugeMetricFamily("stuck", "A collector that takes its time.", 1)

            def describe(self) -> list[GaugeMetricFamily]:
                return []

        worker = make(stop_timeout=0.5)
        worker.start()
        await asyncio.to_thread(registered, worker)
        registry.register(Stuck())
        scrape = threading.Thread(target=lambda: _quietly(worker))
        scrape.start()
        assert await asyncio.to_thread(stuck.wait, 5)
        async with asyncio.timeout(10):  # the collector takes a minute
            await worker.leave()
        worker.stop()
        assert not agent.state.services
        release.set()
        scrape.join()
        wait_until(lambda: not threads(), within=5, what="the end of the thread")

    def test_wiped_directory(
        self,
        agent: DevAgent,
        make: Make,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A worker whose directory was wiped starts again in a new slot, at the same address."""
        monkeypatch.setattr("consul_prom.consul.registrar.TURN", 1)
        worker = make()
        worker.start()
        registered(worker)
        url, meta = worker.url, agent.state.services["shop.web-1.0"].meta
        shutil.rmtree(directory)
        wait_until(
            lambda: any(entry.meta["dir"] != meta["dir"] for entry in agent.state.services.values()),
            within=20,
            what="a new registration",
        )
        assert (worker.url, worker.slot) == (url, 0)
        assert "gives up its slot" in caplog.text
        again = 'consul_prom_registrations_total{reason="start"} 2.0'
        wait_until(lambda: again in page(worker), within=5, what="a second start")


def test_fork(agent: DevAgent, make: Make) -> None:
    """What a forked child does with its parent's worker changes nothing."""
    worker = make()
    worker.start()
    registered(worker)
    child = os.fork()
    if not child:
        worker.stop()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "shop.web-1.0" in agent.state.services
    assert "consul_prom_registered 1.0" in page(worker)
    assert worker._life
    slot = worker._life.tenancy.slot
    assert slot
    assert slot.intact
    assert slots.try_slot(slot.directory, "shop", 0) is None


async def test_lag(make: Make) -> None:
    """A blocked loop shows up as a lag while it is blocked, and after."""
    worker = make(address="127.0.0.1")
    worker.start(loop=asyncio.get_running_loop())

    def lag() -> float:
        line = next(
            line for line in page(worker).splitlines() if line.startswith("consul_prom_event_loop_lag_seconds ")
        )
        return float(line.split()[1])

    await asyncio.to_thread(wait_until, lambda: 0 < lag() < 0.5, within=10, what="a small lag")
    time.sleep(1.5)  # noqa: ASYNC251  # the loop is blocked, while the thread is scraped right here
    assert lag() > 0.3
    await asyncio.to_thread(worker.stop)


async def test_leave(agent: DevAgent, make: Make) -> None:
    """Leaving deregisters and goes on serving until the stop."""
    worker = make()
    worker.start()
    await asyncio.to_thread(registered, worker)
    await worker.leave()
    await worker.leave()
    assert not agent.state.services
    assert "consul_prom_registered 0.0" in await asyncio.to_thread(page, worker)
    worker.stop()


def _quietly(worker: Worker) -> None:
    with suppress(OSError, AssertionError):
        page(worker)


class TestFork:
    """A child that the application forks has nothing of ours, and takes nothing of its parent's away."""

    @staticmethod
    def fork(work: Callable[[], object]) -> int:
        """The exit code of a child that does *work*, 0 if it raises nothing."""
        child = os.fork()
        if not child:
            try:
                work()
            except BaseException:  # noqa: BLE001  # the exit code says it
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def test_descriptors(self, make: Make) -> None:
        """None of the worker's sockets is open in a child, nor its epoll; what the parent has goes on."""
        worker = make()
        worker.start()
        registered(worker)
        page(worker)
        assert worker._life
        thread = worker._life.thread
        wait_until(lambda: len(thread.descriptors()) == 5, within=10, what="the end of what is being closed")
        ours, descriptors = _sockets_of(worker), thread.descriptors()
        assert len(ours) == 4, "a listener, a connection to the agent, the loop's own pair"

        def look() -> None:
            links = {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
            assert not links & ours
            assert {str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in descriptors} == {"/dev/null"}

        assert self.fork(look) == 0
        assert "consul_prom_registered 1.0" in page(worker)

    def test_port(self, make: Make) -> None:
        """A child that outlives the worker keeps neither its port nor its slot."""
        ours, theirs = socket.socketpair()
        settings = {"address": own_address(), "port": 9100}  # an ephemeral one may be somebody's in between
        worker = make(**settings)
        worker.start()
        registered(worker)
        child = os.fork()
        if not child:
            ours.close()
            theirs.send(b"!")
            theirs.recv(1)  # until the parent lets it end
            os._exit(0)
        theirs.close()
        ours.recv(1)  # on a busy machine it may not have run yet, and has the port until it does
        worker.stop()
        again = make(**settings)
        again.start()
        assert again.slot == 0
        assert again.url == f"http://{settings['address']}:9100/metrics"
        ours.close()
        os.waitpid(child, 0)

    def test_right_after_the_start(self, make: Make) -> None:
        """A child that is forked while the worker still starts can import what the worker imports."""
        for delay in (0, 0.01, 0.02, 0.04):
            worker = make(registry=CollectorRegistry(), address="127.0.0.1")
            for name in [name for name in sys.modules if name.partition(".")[0] in {"consul", "requests", "urllib3"}]:
                del sys.modules[name]
            worker.start()
            time.sleep(delay)  # the moment of the fork is what is varied

            def use() -> None:
                signal.alarm(20)
                importlib.import_module("requests")

            assert self.fork(use) == 0
            worker.stop()

    def test_worker_of_the_same_registry_in_child(self, agent: DevAgent, make: Make) -> None:
        """A child may be a worker with the registry that it has from its parent."""
        make().start()
        wait_until(lambda: "shop.web-1.0" in agent.state.services, within=10, what="the parent's entry")

        def work() -> None:
            worker = make()
            worker.start()
            assert registered(worker).slot == 1
            assert "consul_prom_registered 1.0" in page(worker)
            worker.stop()

        assert self.fork(work) == 0
        assert list(agent.state.services) == ["shop.web-1.0"]

    def test_worker_in_child(self, agent: DevAgent, make: Make, registry: CollectorRegistry) -> None:
        """A child may be a worker itself: it has a slot, a port and an entry of its own."""
        make().start()
        wait_until(lambda: "shop.web-1.0" in agent.state.services, within=10, what="the parent's entry")

        def work() -> None:
            worker = make(registry=CollectorRegistry())
            worker.start()
            assert registered(worker).slot == 1
            worker.stop()

        assert self.fork(work) == 0
        assert list(agent.state.services) == ["shop.web-1.0"]

    def test_while_another_thread_starts(self, make: Make) -> None:
        """A child that is forked while another thread of the parent's starts a worker can start one itself."""
        release, held = threading.Event(), threading.Event()

        def hold() -> None:
            with WorkerRuntime.sharing:
                held.set()
                release.wait(30)

        def work() -> None:
            signal.alarm(10)
            worker = make(registry=CollectorRegistry(), address="127.0.0.1")
            worker.start()
            assert worker.slot == 0
            worker.stop()

        starting = threading.Thread(target=hold)
        starting.start()
        assert held.wait(10)
        try:
            assert self.fork(work) == 0
        finally:
            release.set()
            starting.join()

    @pytest.mark.timeout(600)
    @pytest.mark.parametrize("forks", [FORKS, pytest.param(500, marks=pytest.mark.full)])
    def test_no_deadlock(self, make: Make, registry: CollectorRegistry, forks: int) -> None:
        """Children that are forked while scrapes go on can use the registry: no lock of it is held in any of them."""
        lock = threading.Lock()

        class Locked:
            def collect(self) -> Iterator[GaugeMetricFamily]:
                with lock:
                    time.sleep(0.005)  # as a family with many series takes time, under its lock
                    yield GaugeMetricFamily("locked", "A collector that has a lock, as prometheus_client's have.", 1)

            def describe(self) -> list[GaugeMetricFamily]:
                return []

        registry.register(Locked())
        worker = make(address="127.0.0.1")
        worker.start()
        over = threading.Event()

        def scrape() -> None:
            while not over.is_set():
                page(worker)

        def use() -> None:
            assert lock.acquire(timeout=10)

        scraping = threading.Thread(target=scrape)
        scraping.start()
        try:
            assert {self.fork(use) for _ in range(forks)} == {0}
        finally:
            over.set()
            scraping.join()


def _sockets_of(worker: Worker) -> set[str]:
    """The sockets of the worker's loop, as /proc shows them."""
    assert worker._life
    links = {str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in worker._life.thread.descriptors()}
    return {link for link in links if link.startswith("socket:")}


class TestLedger:
    """The counters of a slot outlive its workers."""

    @pytest.fixture
    def hits(self, registry: CollectorRegistry) -> Counter:
        return Counter("hits", "-", ["route"], registry=registry)

    def next_worker(self, make: Make) -> tuple[Worker, Counter]:
        """What a new process of the same application has."""
        registry = CollectorRegistry()
        hits = Counter("hits", "-", ["route"], registry=registry)
        worker = make(registry=registry, address="127.0.0.1")
        worker.start()
        return worker, hits

    def test_is_continued(self, make: Make, hits: Counter) -> None:
        """A slot's next worker shows what the slot has counted, its own metrics too, whichever of both counted it."""
        hits.labels("/early").inc()
        worker = make(address="127.0.0.1")
        worker.start()
        hits.labels("/late").inc(2)
        page(worker)
        assert "consul_prom_scrapes_total 1.0" in page(worker)
        worker.stop()
        again, more = self.next_worker(make)
        more.labels("/late").inc()
        shown = page(again)
        assert 'hits_total{route="/early"} 1.0' in shown
        assert 'hits_total{route="/late"} 3.0' in shown
        assert "consul_prom_scrapes_total 2.0" in shown
        assert more.labels("/late")._value.get() == 1

    @pytest.mark.parametrize(("series", "where"), [(10, "MainThread"), (4000, "consul-prom")])
    def test_large(self, make: Make, hits: Counter, monkeypatch: pytest.MonkeyPatch, series: int, where: str) -> None:
        """A large ledger is read in our thread, before the first scrape is answered, so that no start waits for it."""
        worker = make(address="127.0.0.1")
        worker.start()
        for number in range(series):
            hits.labels(f"/{number}").inc()
        worker.stop()
        threads = []
        take_over = Ledger.take_over

        def noted(*arguments: Any, **options: Any) -> Ledger:
            threads.append(threading.current_thread().name)
            return take_over(*arguments, **options)

        monkeypatch.setattr(Ledger, "take_over", noted)
        again, more = self.next_worker(make)
        more.labels("/1").inc()
        shown = page(again)
        assert threads == [where]
        assert shown.count("hits_total{") == series
        assert 'hits_total{route="/1"} 2.0' in shown

    def test_fork_does_not_wait_for_a_large_one(
        self, make: Make, hits: Counter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A fork of the application does not wait for the reading of a large ledger, only for a metric's binding."""
        worker = make(address="127.0.0.1")
        worker.start()
        for number in range(4000):
            hits.labels(f"/{number}").inc()
        worker.stop()
        reading, asked = threading.Event(), threading.Event()
        take_over = Ledger.take_over

        def slow(*arguments: Any, **options: Any) -> Ledger:
            reading.set()
            assert asked.wait(10)
            return take_over(*arguments, **options)

        monkeypatch.setattr(Ledger, "take_over", slow)
        again, _ = self.next_worker(make)
        assert reading.wait(10)
        is_free = FORK_LOCK.acquire(blocking=False)
        asked.set()
        assert is_free
        FORK_LOCK.release()
        assert page(again).count("hits_total{") == 4000

    def test_port(self, make: Make) -> None:
        """It serves on the port that scrapers know, where that is free, and where any port will do."""
        worker = make(address="127.0.0.1")
        worker.start()
        url = worker.url
        assert url
        worker.stop()
        again, _ = self.next_worker(make)
        assert again.url == url
        again.stop()
        with socket.create_server(("127.0.0.1", int(url.split(":")[2].split("/")[0]))):
            third, _ = self.next_worker(make)
            assert third.url != url
            third.stop()

    def test_stop_of_one_that_failed(
        self, make: Make, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker that has failed, and so disposed of what it had, takes nothing from its successor when it stops."""

        def none(*_: object, **__: object) -> None:
            raise EndpointError("there is no endpoint")

        with monkeypatch.context() as patch:
            patch.setattr("consul_prom.worker.runtime.TargetFactory.endpoint", none)
            failed = make()
            failed.start()
            wait_until(lambda: failed._life and failed._life.failure, within=10, what="a failure")
        assert [record.message for record in caplog.records] == ["consul-prom is off: there is no endpoint"]
        successor = make(address="127.0.0.1")
        successor.start()
        failed.stop()
        late = Counter("late", "-", registry=registry)
        late.inc(5)
        assert "late_total 5.0" in page(successor)
        registry.unregister(late)
        successor.stop()
        assert "late_total" not in page(self.next_worker(make)[0]), "what leaves the registry leaves the ledger"

    def test_killed(self, make: Make, directory: Path, hits: Counter) -> None:
        """So it does when the worker before was killed."""
        child = os.fork()
        if not child:
            worker = make(address="127.0.0.1")
            worker.start()
            hits.labels("/").inc(5)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert (directory / "shop.0.ledger").exists()
        assert 'hits_total{route="/"} 5.0' in page(self.next_worker(make)[0])

    def test_switched_off(self, make: Make, registry: CollectorRegistry, directory: Path, hits: Counter) -> None:
        """Without ledger nothing of prometheus_client is touched, and no later worker continues from below."""
        hits.labels("/").inc()
        worker = make(address="127.0.0.1")
        worker.start()
        worker.stop()
        assert (directory / "shop.0.ledger").exists()
        bare = CollectorRegistry()
        before, counter = set(vars(bare)), Counter("bare", "-", ["x"], registry=bare)
        value = counter.labels("a")._value
        worker = make(registry=bare, address="127.0.0.1", ledger=False)
        worker.start()
        assert set(vars(bare)) == before
        assert counter.labels("a")._value is value
        assert (type(value), type(counter._metrics)) == (MutexValue, dict)
        assert 'bare_total{x="a"} 0.0' in page(worker)
        assert not (directory / "shop.0.ledger").exists()

    def test_cannot_be_had(
        self, make: Make, hits: Counter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker without a ledger counts in memory, after one warning that names the setting."""

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        worker = make(address="127.0.0.1")
        worker.start()
        hits.labels("/").inc()
        assert 'hits_total{route="/"} 1.0' in page(worker)
        warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert warnings[0].startswith("the counters of web-1:0 live in memory: ")
        assert warnings[0].endswith("No space left on device; see CONSUL_PROM_DIR (CONSUL_PROM_LEDGER)")

    def test_unexpected(
        self, make: Make, hits: Counter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An error that nobody expected does the same."""
        monkeypatch.setattr("consul_prom.worker.runtime.LedgerRegistry", lambda *_: 1 / 0)
        worker = make(address="127.0.0.1")
        worker.start()
        hits.labels("/").inc()
        assert 'hits_total{route="/"} 1.0' in page(worker)
        assert "an error not expected" in caplog.text

    def test_wiped(
        self,
        agent: DevAgent,
        make: Make,
        hits: Counter,
        directory: Path,
        *,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Where the directory is wiped, a worker counts on in memory, and its slot's next worker starts anew."""
        caplog.set_level(logging.INFO)
        monkeypatch.setattr("consul_prom.consul.registrar.TURN", 1)
        worker = make(address="127.0.0.1")
        worker.start()
        registered(worker)
        hits.labels("/").inc(5)
        meta = agent.state.services["shop.web-1.0"].meta
        shutil.rmtree(directory)
        directory.mkdir(mode=0o700)
        (directory / "shop.0.ledger").write_text("of another one that was here meanwhile")
        wait_until(
            lambda: any(entry.meta["dir"] != meta["dir"] for entry in agent.state.services.values()),
            within=20,
            what="a new registration",
        )
        hits.labels("/").inc()
        assert 'hits_total{route="/"} 6.0' in page(worker)
        hits.labels("/").inc()
        worker.stop()
        assert "in its ledger" not in caplog.text
        assert "hits_total{" not in page(self.next_worker(make)[0])
