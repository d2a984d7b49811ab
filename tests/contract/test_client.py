"""The client against real Consul, over TCP, TLS and a Unix socket."""

import asyncio
import shutil
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from consul_prom.consul.client import AgentClient
from consul_prom.consul.sync_client import deregister_sync
from consul_prom.errors import (
    AgentRejected,
    AgentUnreachable,
)
from tests.services.consul import Consul
from tests.unit.consul.test_client import DOCUMENT, round_trip, settings


async def test_round_trip_on_real_consul() -> None:
    """Client registers, reads and deregisters on real Consul, and reads what it advertises."""
    with Consul() as consul:
        await round_trip(AgentClient(settings(consul.url)))
        client = AgentClient(settings(consul.url))
        assert (await client.self_())["Member"]["Addr"] == consul.address
        await client.aclose()


async def test_unix_socket(tmp_path: Path) -> None:
    """Client and the synchronous deregister reach an agent over its unix socket."""
    path = f"unix://{tmp_path}/consul.sock"
    with Consul(config={"addresses": {"http": path}}):
        await round_trip(AgentClient(settings(path)))
        client = AgentClient(settings(path))
        await client.register(DOCUMENT)
        await client.aclose()
        assert deregister_sync(settings(path), DOCUMENT["ID"], timeout=5) is True
        assert deregister_sync(settings(path), DOCUMENT["ID"], timeout=5) is False
    client = AgentClient(settings(path))
    with pytest.raises(AgentUnreachable, match="No such file"):
        await client.self_()
    await client.aclose()
    with pytest.raises(AgentUnreachable, match="No such file"):
        deregister_sync(settings(path), DOCUMENT["ID"], timeout=5)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of the CA, of our certificate and key, and of another CA."""
    folder = tmp_path_factory.mktemp("tls")
    names = {name: str(folder / name) for name in ("ca", "cert", "key", "other", "agent-cert", "agent-key")}
    authority.cert_pem.write_to_path(names["ca"])
    trustme.CA().cert_pem.write_to_path(names["other"])
    ours = authority.issue_cert("client.example")
    ours.cert_chain_pems[0].write_to_path(names["cert"])
    ours.private_key_pem.write_to_path(names["key"])
    return names


@pytest.fixture(scope="module")
def tls_consul(authority: trustme.CA, files: dict[str, str]) -> Iterator[Consul]:
    """Real Consul that speaks https only and demands a certificate."""
    certificate = authority.issue_cert("localhost", "server.dc1.consul")
    certificate.cert_chain_pems[0].write_to_path(files["agent-cert"])
    certificate.private_key_pem.write_to_path(files["agent-key"])
    https = {
        "ca_file": files["ca"],
        "cert_file": files["agent-cert"],
        "key_file": files["agent-key"],
        "verify_incoming": True,
    }
    context = ssl.create_default_context(cafile=files["ca"])
    context.load_cert_chain(files["cert"], files["key"])
    context.check_hostname = False
    config = {"ports": {"http": -1, "https": 8501}, "tls": {"https": https}}
    with Consul(config=config, tls=context) as consul:
        yield consul


def tls_arguments(files: dict[str, str]) -> dict[str, str]:
    return {
        "consul_cacert": files["ca"],
        "consul_client_cert": files["cert"],
        "consul_client_key": files["key"],
        "consul_tls_server_name": "server.dc1.consul",
    }


async def test_tls(tls_consul: Consul, files: dict[str, str]) -> None:
    """Client and the synchronous deregister speak TLS with our certificate and the name that we were told."""
    right = settings(tls_consul.url, **tls_arguments(files))
    await round_trip(AgentClient(right))
    client = AgentClient(right)
    await client.register(DOCUMENT)
    await client.aclose()
    assert deregister_sync(right, DOCUMENT["ID"], timeout=5) is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"consul_client_cert": None, "consul_client_key": None}, "CERTIFICATE_REQUIRED|certificate required"),
        ({"consul_cacert": "other"}, "CERTIFICATE_VERIFY_FAILED"),
        ({"consul_tls_server_name": "wrong.example"}, "CERTIFICATE_VERIFY_FAILED"),
        ({"consul_cacert": "missing"}, "CONSUL_CACERT=.* cannot be used: .*No such file"),
        ({"consul_client_cert": "other"}, "CONSUL_CLIENT_CERT=.* cannot be used"),
    ],
)
async def test_tls_trouble(
    tls_consul: Consul, files: dict[str, str], change: dict[str, str | None], words: str
) -> None:
    """Each way in which TLS goes wrong is one sentence of ours, in both clients."""
    changed = {key: files.get(value, value) if value else value for key, value in change.items()}
    wrong = settings(tls_consul.url, **{**tls_arguments(files), **changed})
    client = AgentClient(wrong)
    with pytest.raises(AgentUnreachable, match=words):
        await client.self_()
    await client.aclose()
    with pytest.raises(AgentUnreachable, match=words):
        await asyncio.to_thread(deregister_sync, wrong, "x", timeout=5)


async def test_expired(authority: trustme.CA, tls_consul: Consul, files: dict[str, str], tmp_path: Path) -> None:
    """A certificate that has expired is refused in the agent's words, and one that replaces it is taken up."""
    now = datetime.now(UTC)
    late = authority.issue_cert("client.example", not_before=now - timedelta(9), not_after=now - timedelta(1))
    paths = {"consul_client_cert": tmp_path / "cert", "consul_client_key": tmp_path / "key"}
    late.cert_chain_pems[0].write_to_path(str(paths["consul_client_cert"]))
    late.private_key_pem.write_to_path(str(paths["consul_client_key"]))
    rotated = settings(tls_consul.url, **tls_arguments(files) | {name: str(path) for name, path in paths.items()})
    client = AgentClient(rotated)
    with pytest.raises(AgentUnreachable, match=r"(?i)CERTIFICATE.EXPIRED"):
        await client.self_()
    with pytest.raises(AgentUnreachable, match=r"(?i)CERTIFICATE.EXPIRED"):
        await asyncio.to_thread(deregister_sync, rotated, "x", timeout=5)
    for name, path in paths.items():
        shutil.copy(tls_arguments(files)[name], path)
    await round_trip(client)


async def test_http_to_https(tls_consul: Consul) -> None:
    """Http spoken to an https port is rejected with the agent's own words."""
    client = AgentClient(settings(tls_consul.url.replace("https", "http")))
    with pytest.raises(AgentRejected, match="HTTP request to an HTTPS server"):
        await client.self_()
    await client.aclose()
