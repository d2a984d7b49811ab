"""The bug and its end, on a real Gunicorn, a real Consul and a real Prometheus."""

import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from consul_prom.generate import scrape_config
from consul_prom.settings.settings import load
from tests.services.consul import Consul
from tests.services.gunicorn import Gunicorn
from tests.services.program import own_address
from tests.services.prometheus import Prometheus
from tests.services.waiting import wait_until

HOST = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())


@pytest.fixture(scope="module")
def consul() -> Iterator[Consul]:
    with Consul() as agent:
        yield agent


@pytest.fixture
def shop(consul: Consul) -> Iterator[Gunicorn]:
    with Gunicorn(settings={"CONSUL_HTTP_ADDR": consul.url}) as shop:
        wait_until(lambda: settled(consul, shop), within=60, what="an entry a worker")
        yield shop
    assert not entries(consul), "a clean stop leaves no entry"


def entries(consul: Consul) -> dict[str, dict[str, Any]]:
    status, found = consul.call("/v1/agent/services")
    assert status == 200
    return {key: entry for key, entry in found.items() if entry["Service"] == "shop-metrics"}


def settled(consul: Consul, shop: Gunicorn) -> bool:
    """Whether the entries are those of the live workers, one each."""
    found = [int(entry["Meta"]["pid"]) for entry in entries(consul).values()]
    return len(found) == len(set(found)) == 4 and set(found) == shop.workers()


def snippet(consul: Consul) -> str:
    return scrape_config.prometheus(load({"service": "shop", "consul_http_addr": consul.url}, environ={}))


def url_of(entry: dict[str, Any]) -> str:
    return f"http://{entry['Address']}:{entry['Port']}"


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


def naive_count(shop: Gunicorn) -> float:
    """What a plain /metrics says: the count of whichever worker took the request."""
    found = re.search(r'^reqs_total{view="fire"} (\S+)$', shop.get("/metrics"), re.MULTILINE)
    return float(found[1]) if found else 0


def test_sum(consul: Consul, shop: Gunicorn) -> None:
    """With nothing but our snippet, each worker is a target of its own, and the sum is what was asked of them all."""
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(shop.get, ["/fire"] * 30)) == ["fired"] * 30
    assert max(naive_count(shop) for _ in range(3)) < 30
    with Prometheus(snippet(consul)) as prometheus:
        wait_until(
            lambda: prometheus.query_value('sum(reqs_total{view="fire"})') == 30, within=60, what="30 in Prometheus"
        )
        seen = {(target["labels"]["job"], target["labels"]["instance"]) for target in prometheus.targets()}
        assert seen == {("shop", f"{HOST}:{slot}") for slot in range(4)}
        assert prometheus.query_value('sum(http_requests_total{route="/fire",status="200"})') == 30
        assert prometheus.query_value('count(up{job="shop"} == 1)') == 4


def test_blocked_loop(consul: Consul) -> None:
    """A worker whose loop is blocked for 10 s is up all the time, and shows up as a lag."""
    settings = {"CONSUL_HTTP_ADDR": consul.url}
    with Gunicorn(workers=1, settings=settings) as shop, Prometheus(snippet(consul)) as prometheus:
        wait_until(lambda: prometheus.query_value('up{job="shop"}') == 1, within=60, what="a first scrape")
        begun = time.time()
        blocking = threading.Thread(target=shop.get, args=("/block?seconds=10",), kwargs={"timeout": 30})
        blocking.start()
        wait_until(
            lambda: (prometheus.query_value("consul_prom_event_loop_lag_seconds") or 0) > 5,
            within=30,
            what="the lag in Prometheus",
        )
        assert blocking.is_alive()
        blocking.join()
        blocked = f"[{int(time.time() - begun) + 1}s]"
        assert prometheus.query_value(f'min_over_time(up{{job="shop"}}{blocked})') == 1
        assert (prometheus.query_value(f'count_over_time(up{{job="shop"}}{blocked})') or 0) >= 8


def test_killed_worker(consul: Consul, shop: Gunicorn) -> None:
    """The worker that replaces a killed one takes over its slot, its instance and its entry."""
    killed = entries(consul)[f"shop.{HOST}.2"]
    pid = int(killed["Meta"]["pid"])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pid not in shop.workers() and settled(consul, shop), within=60, what="the new worker's entry")
    now = entries(consul)
    assert set(now) == {f"shop.{HOST}.{slot}" for slot in range(4)}
    assert now[f"shop.{HOST}.2"]["Meta"]["pid"] != str(pid)
    assert "consul_prom_worker_info" in fetch(url_of(now[f"shop.{HOST}.2"]) + "/metrics")


def test_reload(consul: Consul, shop: Gunicorn) -> None:
    """Through a reload no two live workers share an entry, and after it the entries are those of the new workers."""
    before = shop.workers()
    os.kill(shop.pid, signal.SIGHUP)
    wait_until(
        lambda: not before & shop.workers() and settled(consul, shop), within=60, what="four entries of new workers"
    )


def test_lost_entries(consul: Consul, shop: Gunicorn) -> None:
    """Entries that somebody removes come back."""
    for entry_id in entries(consul):
        assert consul.call(f"/v1/agent/service/deregister/{entry_id}", method="PUT")[0] == 200
    wait_until(lambda: settled(consul, shop), within=20, what="the entries again")


def test_agent_comes_late() -> None:
    """Without an agent the application serves; once it comes, the workers register, and after its restart again."""
    late = Consul(address=own_address())
    with Gunicorn(settings={"CONSUL_HTTP_ADDR": late.url}) as shop:
        assert shop.get("/fire") == "fired"
        with late:
            wait_until(lambda: settled(late, shop), within=60, what="the entries")
            late.kill()
            assert shop.get("/fire") == "fired"
            late.start()
            wait_until(lambda: settled(late, shop), within=60, what="the entries again")
            shop.stop()
            assert not entries(late)


def test_agent_never_comes() -> None:
    """Without any agent, the application serves and its stop is not held up for long."""
    with Gunicorn(settings={"CONSUL_HTTP_ADDR": f"{own_address()}:8500"}) as shop:
        assert shop.get("/fire") == "fired"
        assert shop.stop(within=20) == 0
        assert "Traceback" not in shop.log.read_text()


def test_streams_end_with_the_process(consul: Consul, shop: Gunicorn) -> None:
    """A request in flight at a stop is answered, and the entries are gone before it ends."""
    answers: list[str] = []
    napping = threading.Thread(target=lambda: answers.append(shop.get("/nap?seconds=3", timeout=20)))
    napping.start()
    busy = 'http_requests_in_progress{method="GET",route="/nap"} 1.0'
    wait_until(
        lambda: any(busy in fetch(url_of(entry) + "/metrics") for entry in entries(consul).values()),
        within=10,
        what="the request in flight",
    )
    os.kill(shop.pid, signal.SIGTERM)
    wait_until(lambda: not entries(consul), within=20, what="no entry")
    assert napping.is_alive()
    napping.join()
    assert answers == ["done"]
