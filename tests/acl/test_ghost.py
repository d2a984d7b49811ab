"""An agent without a token of its own, which drops an entry and leaves it in the catalogue, passing."""

import logging
import os
import signal
from collections.abc import AsyncIterator, Callable

import pytest

from consul_prom.consul.acl import write_rule
from consul_prom.consul.client import AgentClient
from consul_prom.consul.registrar import Registrar
from consul_prom.settings.settings import load
from tests.acl.access import Access, Make
from tests.services.gunicorn import HOOKS, Gunicorn
from tests.services.waiting import wait_until
from tests.unit.consul.test_registrar import WANTED, registration

RULE = write_rule("shop-metrics")
READ_NODES = 'node_prefix "" { policy = "read" }'
NEIGHBOUR = registration(id="shop.web-1.7", port=9107)

MakeClient = Callable[[Access, str], AgentClient]


@pytest.fixture
async def make_client() -> AsyncIterator[MakeClient]:
    made: list[AgentClient] = []

    def make(access: Access, token: str) -> AgentClient:
        settings = {"consul_http_addr": access.consul.url, "consul_http_token": token}
        made.append(AgentClient(load(settings, environ={})))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()


@pytest.fixture(autouse=True)
def _no_ghost(helpless: Access) -> None:
    """Nothing is left of the test before."""
    node = helpless.consul.config["node_name"]
    for entry_id in helpless.catalogue():
        helpless.consul.call(f"/v1/agent/service/deregister/{entry_id}", method="PUT")
        body = {"Node": node, "ServiceID": entry_id}
        helpless.consul.call("/v1/catalog/deregister", method="PUT", body=body)
    assert not helpless.catalogue()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_ghost(helpless: Access, make_client: MakeClient) -> None:
    """Such an agent says that it has removed an entry, and the catalogue has it still; that is what we finish."""
    client = make_client(helpless, helpless.token(RULE))
    await client.register(WANTED.document())
    wait_until(lambda: WANTED.id in helpless.catalogue(), within=60, what="in the catalogue")
    assert await client.deregister(WANTED.id) is True
    assert (helpless.entries(), helpless.catalogue()) == ({}, {WANTED.id: "passing"})


@pytest.mark.parametrize("rules", [[RULE], [RULE, READ_NODES]], ids=["least policy", "and node:read"])
@pytest.mark.parametrize("turns", [1, 2], ids=["at once", "later"])
async def test_finished(
    helpless: Access, make_client: MakeClient, caplog: pytest.LogCaptureFixture, rules: list[str], turns: int
) -> None:
    """The registrar removes its entry from the catalogue as well, and no other, whether or not it may read that."""
    client = make_client(helpless, helpless.token(*rules))
    registrar = Registrar(client, WANTED)
    for _ in range(turns):
        await registrar.sync()
    await client.register(NEIGHBOUR.document())
    assert await registrar.deregister() is True
    assert list(helpless.catalogue()) == [NEIGHBOUR.id]
    assert not said(caplog)


async def test_nothing_to_finish(guarded: Access, make_client: MakeClient) -> None:
    """Beside an agent with a token of its own, the catalogue is read at a stop and not written to."""
    client = _Recording(make_client(guarded, guarded.token(RULE)))
    registrar = Registrar(client, WANTED)
    await registrar.sync()
    await client.register(NEIGHBOUR.document())
    assert await registrar.deregister() is True
    assert (client.looked, client.finished) == (1, 0)
    assert await client.deregister(NEIGHBOUR.id)


async def test_nothing_there(helpless: Access, make_client: MakeClient) -> None:
    """An entry that is not in the catalogue is as good as removed from it."""
    client = make_client(helpless, helpless.token(RULE))
    await client.deregister_from_catalogue(WANTED.id, helpless.consul.config["node_name"])


async def test_not_finished(helpless: Access, make_client: MakeClient, caplog: pytest.LogCaptureFixture) -> None:
    """Where it cannot be removed, one sentence names the token that the agent lacks."""
    token = helpless.token(RULE)
    client = _Recording(make_client(helpless, token), afterwards=lambda: helpless.delete(token))
    registrar = Registrar(client, WANTED)
    await registrar.sync()
    assert await registrar.deregister() is True
    (warning,) = said(caplog)
    assert warning.startswith(f"the catalogue keeps {WANTED.id}, though the agent has dropped it: ")
    assert "403: ACL not found" in warning
    node = helpless.consul.config["node_name"]
    assert warning.endswith(f"give the agent of node {node} a token of its own (acl.tokens.agent) with node:write")


def test_worker(helpless: Access, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A worker with the least policy leaves nothing in the catalogue."""
    worker = make(helpless, consul_http_token=helpless.token(RULE))
    worker.start()
    wait_until(lambda: worker.registered and helpless.catalogue(), within=20, what="in the catalogue")
    worker.stop()
    assert (helpless.entries(), helpless.catalogue()) == ({}, {})
    assert not said(caplog)


@pytest.mark.parametrize("agent", ["helpless", "guarded"])
def test_killed(request: pytest.FixtureRequest, agent: str) -> None:
    """What Gunicorn's master removes for workers that it had to kill leaves nothing in the catalogue either."""
    access: Access = request.getfixturevalue(agent)
    settings = {"CONSUL_HTTP_ADDR": access.consul.url, "CONSUL_HTTP_TOKEN": access.token(RULE)}
    with Gunicorn(workers=2, settings=settings, options=[*HOOKS, "--graceful-timeout=1"]) as shop:
        wait_until(lambda: len(access.catalogue()) == 2, within=60, what="both in the catalogue")
        for pid in shop.workers():
            os.kill(pid, signal.SIGSTOP)
        shop.stop(within=30)
        assert "left to its siblings" not in shop.log.read_text()
    assert (access.entries(), access.catalogue()) == ({}, {})


class _Recording(AgentClient):
    """Counts what it asks of the catalogue, and calls *afterwards* once the agent has dropped an entry."""

    def __init__(self, client: AgentClient, *, afterwards: Callable[[], None] = lambda: None) -> None:
        self._transport, self._agent, self._json = client._transport, client._agent, client._json
        self._afterwards = afterwards
        self.looked = self.finished = 0

    async def deregister(self, entry_id: str) -> bool:
        was_there = await super().deregister(entry_id)
        self._afterwards()
        return was_there

    async def catalogued(self, name: str, entry_id: str, node: str) -> bool:
        self.looked += 1
        return await super().catalogued(name, entry_id, node)

    async def deregister_from_catalogue(self, entry_id: str, node: str) -> None:
        self.finished += 1
        await super().deregister_from_catalogue(entry_id, node)
