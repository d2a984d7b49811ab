"""Workers that stop while the servers or the agent are away: in time, and with nothing left where that can be."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry

from consul_prom.cli import main as cli_main
from consul_prom.worker.worker import Worker
from tests.cluster.cluster import Cluster
from tests.services.waiting import wait_until

STOP_TIMEOUT = 2.0
SLACK = 1.0
Fault = Callable[[Cluster], None]


@pytest.fixture
def workers(cluster: Cluster, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Worker]]:
    """Three workers of one directory, registered."""
    workers = [
        Worker(
            registry=CollectorRegistry(),
            service="shop",
            host="web-1",
            dir=slot_directory,
            consul_http_addr=cluster.agent.url,
            stop_timeout=STOP_TIMEOUT,
        )
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    wait_until(lambda: all(worker.registered for worker in workers), within=60, what="registered")
    wait_until(lambda: len(catalogue(cluster)) == 3, within=60, what="in the catalogue")
    yield workers
    for worker in workers:
        worker.stop()


def entries(cluster: Cluster) -> set[str]:
    status, found = cluster.agent.call("/v1/agent/services", timeout=100)
    assert status == 200, found
    return set(found)


def catalogue(cluster: Cluster) -> set[str]:
    return set(cluster.catalogue(cluster.leader(), "shop-metrics"))


def stop(workers: list[Worker]) -> list[float]:
    """Seconds that each of *workers* took, together, to stop."""

    def one(worker: Worker) -> float:
        begun = time.monotonic()
        worker.stop()
        return time.monotonic() - begun

    with ThreadPoolExecutor(len(workers)) as threads:
        return list(threads.map(one, workers))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name.startswith("consul_prom")]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


def test_without_leader(cluster: Cluster, workers: list[Worker]) -> None:
    """With the leader just killed a stop is in time, and the catalogue follows with the next leader."""
    cluster.leader().kill()
    assert max(stop(workers)) < STOP_TIMEOUT + SLACK
    wait_until(lambda: not entries(cluster), within=60, what="gone from the agent")
    wait_until(lambda: not catalogue(cluster), within=100, what="gone from the catalogue")


def test_without_servers(cluster: Cluster, workers: list[Worker], caplog: pytest.LogCaptureFixture) -> None:
    """Without servers a stop is done with the agent alone, quickly and without a word."""
    for server in cluster.servers:
        server.kill()
    assert max(stop(workers)) < STOP_TIMEOUT
    assert not entries(cluster)
    assert not said(caplog)
    cluster.start(cluster.servers)
    wait_until(lambda: not catalogue(cluster), within=100, what="gone from the catalogue")


def test_hanging_agent(cluster: Cluster, workers: list[Worker], caplog: pytest.LogCaptureFixture) -> None:
    """An agent that hangs because of its servers drops the entries of those that stopped when it can again."""
    for server in cluster.servers:
        server.pause()
    with pytest.raises(TimeoutError):  # what makes it hang is that it has something to tell its servers
        cluster.agent.call("/v1/agent/service/register", method="PUT", body={"Name": "other"}, timeout=1)
    assert cluster.hanging()
    assert max(stop(workers)) < STOP_TIMEOUT + SLACK
    assert [text.partition(" may still be registered: ")[2][:30] for text in said(caplog)] == [
        "the agent did not answer withi"
    ] * 3
    for server in cluster.servers:
        server.resume()
    wait_until(lambda: entries(cluster) == {"other"}, within=100, what="gone from the agent")
    wait_until(lambda: not catalogue(cluster), within=100, what="gone from the catalogue")


def test_killed_agent(cluster: Cluster, workers: list[Worker], caplog: pytest.LogCaptureFixture) -> None:
    """With the agent killed a stop is in time, and what each worker says is left over, the command removes."""
    cluster.agent.kill()
    assert max(stop(workers)) < STOP_TIMEOUT + SLACK
    left = [text for text in said(caplog) if text.endswith("` removes it")]
    assert len(left) == 3
    cluster.agent.start()
    assert len(entries(cluster)) == 3
    env = {"CONSUL_HTTP_ADDR": cluster.agent.url, "CONSUL_PROM_HOST": "web-1"}
    done = CliRunner().invoke(cli_main.commands, ["deregister", "--all"], env=env)
    assert done.exit_code == 0, done.output
    assert not entries(cluster)
    wait_until(lambda: not catalogue(cluster), within=100, what="gone from the catalogue")
