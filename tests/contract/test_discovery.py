"""Real Consul checks the servers of prometheus_async."""

import asyncio
import ssl
from pathlib import Path

import trustme
from prometheus_async.aio.web import start_http_server

from consul_prom import ConsulDiscovery
from tests.services.consul import Consul
from tests.services.waiting import eventually


async def test_check(tmp_path: Path) -> None:
    """The check that real Consul runs against prometheus_async's server passes, with TLS too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("anything.example").configure_cert(context)
    with Consul() as consul:
        discovery = ConsulDiscovery(
            service="shop", host="web-1", consul_http_addr=consul.url, dir=tmp_path / "slots", check_interval=1
        )
        servers = [
            await start_http_server(addr="127.0.0.1", ssl_ctx=tls, service_discovery=discovery)
            for tls in (None, context)
        ]

        def passing() -> bool:
            checks = consul.call("/v1/agent/checks")[1].values()
            return [check["Output"][:8] for check in checks if check["Status"] == "passing"] == ["HTTP GET"] * 2

        await eventually(lambda: asyncio.to_thread(passing), within=30, what="two passing checks that have run")
        for server in servers:
            await server.close()
        assert consul.call("/v1/agent/services")[1] == {}
