"""A shop beside a client agent, while its servers or the agent itself are away: it serves, and in the end all is true.

Times are ten times what we want or more: a machine that runs tests is a busy one.
"""

import os
import signal
import time

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.shop import Shop, Traffic, tell
from tests.services.waiting import wait_until


def replace_worker(shop: Shop) -> None:
    """Kill a worker, and wait for the next one: a change that the agent is to be told of."""
    before = shop.workers()
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: len(shop.workers() - before) == 1 and len(shop.workers()) == 3, within=30, what="a new worker")


def test_leader_killed(cluster: Cluster, shop: Shop) -> None:
    """A change while there is no leader is in the agent at once, and in the catalogue of the others when one is."""
    leader = cluster.leader()
    with Traffic(shop):
        leader.kill()
        wait_until(lambda: shop.settled() and cluster.leader() is not leader, within=60, what="another leader")
    cluster.leader().kill()
    replace_worker(shop)
    wait_until(shop.settled, within=60, what="the live workers in the agent")
    cluster.start([server for server in cluster.servers if not server.running])
    shop.wait_settled(within=60)


def test_servers_killed(cluster: Cluster, shop: Shop) -> None:
    """Without any server the agent has the live workers all the same, and the catalogue when they are back."""
    with Traffic(shop):
        for server in cluster.servers:
            server.kill()
        for entry_id in shop.entries():
            assert cluster.agent.call(f"/v1/agent/service/deregister/{entry_id}", method="PUT")[0] == 200
        begun = time.monotonic()
        wait_until(shop.settled, within=30, what="the lost entries again")
        tell("in the agent, without servers", since=begun)
    replace_worker(shop)
    shop.scale(-1)
    wait_until(shop.settled, within=60, what="the live workers in the agent")
    cluster.start(cluster.servers)
    shop.wait_settled(within=60)


@pytest.mark.parametrize(
    "long", [False, pytest.param(True, marks=pytest.mark.full)], ids=["short", "until it gives up"]
)
def test_servers_frozen(cluster: Cluster, shop: Shop, *, long: bool) -> None:
    """Servers that hang make the agent hang; the shop serves, and when the agent answers it has the live workers."""
    with Traffic(shop):
        for server in cluster.servers:
            server.pause()
        # The youngest worker's, which stays: one that stops while its own registration hangs cannot take that back.
        entry_id = max(shop.entries().items(), key=lambda item: int(item[1]["Meta"]["pid"]))[0]
        with pytest.raises(TimeoutError):
            cluster.agent.call(f"/v1/agent/service/deregister/{entry_id}", method="PUT", timeout=1)
        assert cluster.hanging()
    replace_worker(shop)
    shop.scale(-1)
    if long:
        wait_until(lambda: not cluster.hanging(), within=300, what="an agent that answers by itself")
        assert "did not answer within" in shop.log.read_text()
    for server in cluster.servers:
        server.resume()
    wait_until(lambda: not cluster.hanging(), within=100, what="an agent that answers")
    shop.wait_settled(within=150)


def test_agent_leaves(cluster: Cluster, shop: Shop) -> None:
    """An agent that leaves and comes back has the live workers, whoever lived when it left."""
    with Traffic(shop):
        assert cluster.agent.stop() == 0
    replace_worker(shop)
    cluster.agent.start()
    shop.wait_settled(within=60)


def test_agent_killed(cluster: Cluster, shop: Shop) -> None:
    """An agent that is killed comes back with its entries; those of the live workers stay, others are put right."""
    with Traffic(shop):
        cluster.agent.kill()
    replace_worker(shop)
    cluster.agent.start()
    shop.wait_settled(within=60)
