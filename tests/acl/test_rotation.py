"""Tokens that are deleted and replaced while workers are registered with them."""

import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from prometheus_client import CollectorRegistry

from consul_prom.consul.acl import write_rule
from consul_prom.consul.client import AgentClient
from consul_prom.consul.registrar import Registrar
from consul_prom.consul.registration import Registration
from consul_prom.errors import AgentDenied, AgentTimeout
from consul_prom.settings.settings import load
from tests.acl.access import Access, Make, replace
from tests.services.waiting import eventually, wait_until
from tests.unit.consul.test_registrar import registration

RULE = write_rule("shop-metrics")
ENTRY = "shop.web-1.0"


class Checked:
    """A worker's endpoint as the agent sees it: its check passes until it is told to fail."""

    def __init__(self) -> None:
        self._status = 200
        app = web.Application()
        app.add_routes([web.get("/-/healthy", self._answer)])
        self._server = TestServer(app)

    async def start(self) -> Registration:
        await self._server.start_server()
        assert self._server.port
        return registration(port=self._server.port, check_interval=1)

    def fail(self) -> None:
        self._status = 503

    async def aclose(self) -> None:
        await self._server.close()

    async def _answer(self, _request: web.Request) -> web.Response:
        return web.Response(status=self._status)


@pytest.fixture
async def checked() -> AsyncIterator[Checked]:
    checked = Checked()
    yield checked
    await checked.aclose()


@pytest.fixture
async def client(guarded: Access, token_file: Path) -> AsyncIterator[AgentClient]:
    settings = {"consul_http_addr": guarded.consul.url, "consul_http_token_file": str(token_file)}
    client = AgentClient(load(settings, environ={}))
    yield client
    guarded.deregister(ENTRY)
    await client.aclose()


def statuses(guarded: Access) -> tuple[str, str]:
    """What the agent and what the catalogue say of the entry."""
    (check,) = guarded.consul.call("/v1/agent/checks")[1].values()
    return check["Status"], guarded.catalogue()[ENTRY]


async def test_checks_after_deletion(guarded: Access, client: AgentClient, checked: Checked, token_file: Path) -> None:
    """With the registering token deleted a failing check does not reach the catalogue; that is what we repair."""
    token = guarded.token(RULE)
    replace(token_file, token)
    await Registrar(client, await checked.start()).sync()
    guarded.delete(token)
    checked.fail()
    await eventually(lambda: statuses(guarded)[0] == "critical", within=30, what="critical in the agent")
    blocked = "Check registration blocked by ACLs"
    await eventually(lambda: blocked in guarded.consul.log.read_text(), within=30, what="the agent denied")
    assert statuses(guarded) == ("critical", "passing")


async def test_rotation(guarded: Access, client: AgentClient, checked: Checked, token_file: Path) -> None:
    """A new token is told to the agent while the old one lives, and the checks reach the catalogue after its end."""
    reasons: list[str] = []
    old, new = guarded.token(RULE), guarded.token(RULE)
    replace(token_file, old)
    registrar = Registrar(client, await checked.start(), on_registration=reasons.append)
    entry = await registrar.sync()
    replace(token_file, new)
    for _ in range(3):
        entry = await registrar.sync(entry)
    assert reasons == ["start", "token"]
    guarded.delete(old)
    checked.fail()
    await eventually(lambda: statuses(guarded) == ("critical", "critical"), within=30, what="critical in the catalogue")


async def test_late_rotation(guarded: Access, client: AgentClient, checked: Checked, token_file: Path) -> None:
    """A token deleted before its file is replaced is denied, and after that the checks reach the catalogue."""
    reasons: list[str] = []
    old, new = guarded.token(RULE), guarded.token(RULE)
    replace(token_file, old)
    registrar = Registrar(client, await checked.start(), on_registration=reasons.append)
    await registrar.sync()
    guarded.delete(old)
    with pytest.raises(AgentDenied, match="403: ACL not found"):
        await registrar.sync()
    replace(token_file, new)
    await registrar.sync()
    assert reasons == ["start", "token"]
    checked.fail()
    await eventually(lambda: statuses(guarded) == ("critical", "critical"), within=30, what="critical in the catalogue")


async def test_rotation_to_a_token_of_no_right(
    guarded: Access, client: AgentClient, checked: Checked, token_file: Path
) -> None:
    """A new token that was denied at first is told to the agent once it has its right, though the entry was there."""
    reasons: list[str] = []
    old, new = guarded.token(RULE), guarded.token('service "shop-metrics" { policy = "read" }')
    replace(token_file, old)
    registrar = Registrar(client, await checked.start(), on_registration=reasons.append)
    await registrar.sync()
    replace(token_file, new)
    with pytest.raises(AgentDenied):
        await registrar.sync()
    guarded.grant(new, RULE)
    await registrar.sync()
    await registrar.sync()
    assert reasons == ["start", "token"]


async def test_rotation_after_a_lost_answer(
    guarded: Access, client: AgentClient, checked: Checked, token_file: Path
) -> None:
    """A registration whose answer was lost is compared, not repeated; the next token is told to the agent even so."""
    reasons: list[str] = []
    replace(token_file, guarded.token(RULE))
    lossy = _Lossy(client)
    registrar = Registrar(lossy, await checked.start(), on_registration=reasons.append)
    with pytest.raises(AgentTimeout):
        await registrar.sync()
    await registrar.sync()
    assert (registrar.registered, lossy.registrations) == (True, 1)
    replace(token_file, guarded.token(RULE))
    await registrar.sync()
    assert (reasons, lossy.registrations) == (["token"], 2)


class _Lossy(AgentClient):
    """A client that does not hear the answer to its first registration."""

    def __init__(self, client: AgentClient) -> None:
        self._transport, self._agent, self._json = client._transport, client._agent, client._json
        self.registrations = 0

    async def register(self, document: Mapping[str, Any]) -> None:
        await super().register(document)
        self.registrations += 1
        if self.registrations == 1:
            raise AgentTimeout("the answer was lost")


def test_worker(
    guarded: Access, make: Make, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture, token_file: Path
) -> None:
    """A worker outlives the deletion and the replacement of its token, in either order; a denial is told once."""

    def registrations() -> float:
        return registry.get_sample_value("consul_prom_registrations_total", {"reason": "token"}) or 0

    first, second, third = (guarded.token(RULE) for _ in range(3))
    replace(token_file, first)
    worker = make(guarded, consul_http_token_file=str(token_file))
    worker.start()
    wait_until(lambda: worker.registered, within=20, what="registered")
    replace(token_file, second)
    wait_until(lambda: registrations() == 1, within=20, what="registered with the second token")
    guarded.delete(first)
    guarded.delete(second)
    wait_until(lambda: not worker.registered, within=20, what="denied")
    replace(token_file, third)
    wait_until(lambda: worker.registered and registrations() == 2, within=20, what="registered with the third token")
    worker.stop()
    assert (guarded.entries(), guarded.catalogue()) == ({}, {})
    denied, again = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert denied.endswith(f"the token needs the rule: {RULE}")
    assert again.endswith("is registered again")
