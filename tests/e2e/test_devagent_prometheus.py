"""A real Prometheus finds its targets through the dev agent."""

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, start_http_server

from consul_prom.devagent import DevAgent, running
from tests.services.prometheus import Prometheus
from tests.services.waiting import wait_until


@contextlib.contextmanager
def serving(count: int) -> Iterator[int]:
    """The port of a metrics page with a counter that stands at `count`."""
    registry = CollectorRegistry()
    Counter("reqs", "Requests.", registry=registry).inc(count)
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def register(agent: DevAgent, slot: int, port: int) -> None:
    document = {
        "Name": "shop-metrics",
        "ID": f"shop.web-1.{slot}",
        "Tags": ["consul-prom", "v1"],
        "Address": "127.0.0.1",
        "Port": port,
        "Meta": {"instance": f"web-1:{slot}"},
        "Check": {"TCP": f"127.0.0.1:{port}", "Interval": "1s", "Status": "passing"},
    }
    url = f"{agent.url}/v1/agent/service/register"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(document).encode(), method="PUT"), timeout=5):
        pass


def deregister(agent: DevAgent, slot: int) -> None:
    url = f"{agent.url}/v1/agent/service/deregister/shop.web-1.{slot}"
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5):
        pass


def scrape_config(agent: DevAgent, **discovery: Any) -> list[dict[str, Any]]:
    relabel = {"source_labels": ["__meta_consul_service_metadata_instance"], "target_label": "instance"}
    server = {"server": agent.address, "refresh_interval": "1s"}
    return [{"job_name": "shop", "consul_sd_configs": [server | discovery], "relabel_configs": [relabel]}]


def test_discovery() -> None:
    """Prometheus finds, scrapes and loses targets as they come and go, by name and by tag."""
    with running() as agent, serving(3) as first, serving(4) as second:
        register(agent, 0, first)
        config = scrape_config(agent, services=["shop-metrics"])
        config += [{**scrape_config(agent, tags=["consul-prom"])[0], "job_name": "by-tag"}]
        with Prometheus(config) as prometheus:
            query = 'sum by (job) (reqs_total{instance=~"web-1:."})'

            def sums() -> dict[str, float]:
                return {sample["metric"]["job"]: float(sample["value"][1]) for sample in prometheus.query(query)}

            wait_until(lambda: sums() == {"shop": 3, "by-tag": 3}, within=60, what="one target")
            register(agent, 1, second)
            wait_until(lambda: sums() == {"shop": 7, "by-tag": 7}, within=60, what="two targets")
            (labels, *_) = [target["discoveredLabels"] for target in prometheus.targets()]
            assert labels["__meta_consul_tags"] == ",consul-prom,v1,"
            assert labels["__meta_consul_health"] == "passing"
            assert labels["__meta_consul_dc"] == "dc1"
            deregister(agent, 0)
            wait_until(lambda: sums() == {"shop": 4, "by-tag": 4}, within=60, what="the second target")


def test_restart() -> None:
    """Prometheus sees at its next try what a restarted agent holds, not two minutes later."""
    agent = DevAgent()
    with contextlib.ExitStack() as stack, serving(3) as first, serving(4) as second:
        with running(agent):
            for slot in range(5):
                register(agent, slot, first)
            config = scrape_config(agent, services=["shop-metrics"])
            prometheus = stack.enter_context(Prometheus(config))
            wait_until(lambda: prometheus.query_value("count(reqs_total)") == 5, within=60, what="five targets")
        with running(agent):
            register(agent, 7, second)
            # Prometheus pauses for 15 s after a failure.
            wait_until(lambda: prometheus.query_value("sum(reqs_total)") == 4, within=110, what="the new target")
