"""The public surface, as mypy sees it. Checked, never executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import assert_type

from aiohttp import web
from prometheus_async.types import ServiceDiscovery
from prometheus_client import CollectorRegistry

import consul_prom
from consul_prom import ConsulDiscovery, ConsulPromError, SettingsError, Worker, setup
from consul_prom.devagent import DevAgent, running


def one_line(app: web.Application) -> None:
    """The one line of the README."""
    assert_type(consul_prom.setup(app, service="shop"), Worker)


def every_argument(app: web.Application, registry: CollectorRegistry, meta: Mapping[str, str]) -> None:
    """Every setting, in the forms that are allowed."""
    setup(
        app,
        registry=registry,
        service="shop",
        consul_service="shop-m",
        host="web-1",
        address="10.0.0.7",
        bind="0.0.0.0",
        port=9100,
        tags=("a", "b"),
        meta=meta,
        dir=Path("/run/shop"),
        check_interval="30s",
        check_timeout=5,
        deregister_after=600.0,
        start_timeout=10,
        stop_timeout="2s",
        required=True,
        request_metrics="false",
        disabled=False,
        consul_http_addr="https://agent:8501",
        consul_http_token="t",
        consul_http_token_file="/t",
        consul_http_auth="me:p",
        consul_http_ssl=True,
        consul_http_ssl_verify="true",
        consul_cacert="/ca",
        consul_capath="/ca",
        consul_client_cert="/c",
        consul_client_key="/k",
        consul_tls_server_name="server.dc1.consul",
        consul_namespace="a",
        consul_partition="b",
    )
    setup(app, port="9100-9131", tags="a,b", meta="k=v", dir="/run/shop")


def wrong_arguments(app: web.Application) -> None:
    """What a type checker refuses before SettingsError does."""
    setup(app, "shop")  # type: ignore[call-arg, arg-type]
    setup(app, servcie="shop")  # type: ignore[call-arg]
    setup(app, service=7)  # type: ignore[arg-type]
    setup(app, port=9100.0)  # type: ignore[arg-type]
    setup(app, service=None)  # type: ignore[arg-type]
    Worker(None)  # type: ignore[call-arg, arg-type]


def any_process(registry: CollectorRegistry) -> None:
    """A worker without a framework."""
    worker = Worker(registry=registry, service="nightly")
    worker.start()
    assert_type(worker.url, str | None)
    assert_type(worker.slot, int | None)
    assert_type(worker.instance, str | None)
    assert_type(worker.registered, bool)
    worker.stop()
    worker.slot = 1  # type: ignore[misc]


def any_block() -> None:
    """A worker for as long as a block lasts."""
    with consul_prom.running(service="nightly", port=9100) as worker:
        assert_type(worker, Worker)


async def leave_early(worker: Worker) -> None:
    """The asynchronous half of a stop."""
    await worker.leave()


def discovery() -> ServiceDiscovery:
    """What prometheus_async takes."""
    return ConsulDiscovery(service="shop", port="9100", required=True)


def errors(error: SettingsError) -> None:
    """What is raised is ours, and a ValueError where a value is wrong."""
    one: ConsulPromError = error
    other: ValueError = error
    assert_type(error.from_code, bool)
    assert_type((one, other), tuple[ConsulPromError, ValueError])


def agent() -> None:
    """The agent of the tests."""
    with running() as found:
        assert_type(found, DevAgent)
        assert_type(found.address, str)


assert_type(consul_prom.__version__, str)
