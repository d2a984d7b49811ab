"""The registrar's turns against real Consul."""

import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from consul_prom.consul.client import AgentClient
from consul_prom.consul.registrar import Registrar
from consul_prom.settings.settings import TAG, load
from tests.services.consul import Consul
from tests.unit.consul.test_registrar import WANTED, registration


@pytest.fixture(scope="module")
def consul() -> Iterator[Consul]:
    with Consul() as consul:
        yield consul


@pytest.fixture
async def real(consul: Consul) -> AsyncIterator[AgentClient]:
    client = AgentClient(load({"consul_http_addr": consul.url}, environ={}))
    yield client
    await client.deregister(WANTED.id)
    await client.aclose()


class TestOnRealConsul:
    """What the dev agent may get wrong: how Consul tells a document and a check again."""

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"address": "::1"},
            {"check_interval": 90, "check_timeout": 0.25, "deregister_after": 3600},
            {"check_interval": 1.5, "tags": (TAG, "b", "a")},
        ],
        ids=str,
    )
    async def test_idle_turn(self, real: AgentClient, changes: dict[str, Any]) -> None:
        """What was registered is found as wanted, whatever its addresses and durations."""
        reasons: list[str] = []
        registrar = Registrar(real, registration(**changes), on_registration=reasons.append)
        entry = await registrar.sync()
        await registrar.sync(entry)
        await registrar.sync()
        assert reasons == ["start"]

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"check_interval": 20}, "Check.Interval"),
            ({"check_timeout": 2}, "Check.Timeout"),
            ({"deregister_after": 61}, "Check.Notes"),
        ],
        ids=["interval", "timeout", "deregister after"],
    )
    async def test_other_check(
        self, real: AgentClient, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], field: str
    ) -> None:
        """A changed check, which the blocking read does not see, is found by the next turn, and named."""
        caplog.set_level(logging.INFO, "consul_prom.consul.registrar")
        registrar = Registrar(real, WANTED)
        await registrar.sync()
        await real.register(registration(**changes).document())
        await registrar.sync()
        assert f"differed in {field}" in caplog.text

    async def test_maintenance(self, consul: Consul, real: AgentClient) -> None:
        """An operator's maintenance mode of the entry is not undone."""
        reasons: list[str] = []
        registrar = Registrar(real, WANTED, on_registration=reasons.append)
        await registrar.sync()
        path = f"/v1/agent/service/maintenance/{WANTED.id}?enable=true"
        assert consul.call(path, method="PUT")[0] == 200
        await registrar.sync()
        assert reasons == ["start"]
        assert {check["Status"] for check in await real.checks(WANTED.id)} == {"passing", "critical"}

    async def test_no_check(self, consul: Consul, real: AgentClient, caplog: pytest.LogCaptureFixture) -> None:
        """A check that was removed comes back."""
        caplog.set_level(logging.INFO, "consul_prom.consul.registrar")
        registrar = Registrar(real, WANTED)
        await registrar.sync()
        assert consul.call(f"/v1/agent/check/deregister/service:{WANTED.id}", method="PUT")[0] == 200
        await registrar.sync()
        assert "differed in Checks" in caplog.text
        assert len(await real.checks(WANTED.id)) == 1
