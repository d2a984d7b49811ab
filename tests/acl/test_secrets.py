"""No secret is in anything that a run writes, shows or tells, whatever went wrong in it."""

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry

from consul_prom.cli import main as cli_main
from consul_prom.consul.acl import write_rule
from consul_prom.consul.client import AgentClient
from consul_prom.consul.sync_client import deregister_sync, remove_sync, service_sync
from consul_prom.errors import AgentError, SettingsError
from consul_prom.settings.settings import load
from consul_prom.worker.worker import Worker
from tests.acl.access import Access, Make, replace
from tests.services.echo import SHAPES, EchoingAgent
from tests.services.gunicorn import Gunicorn
from tests.services.traces import fetch, told, written
from tests.services.waiting import wait_until

RULE = write_rule("shop-metrics")


@pytest.mark.parametrize("source", ["environment", "file"])
def test_gunicorn(guarded: Access, token_file: Path, source: str) -> None:
    """Through a denial, a grant, a loss, a rotation and a stop, a shop tells its token to nobody but the agent."""
    token, later = guarded.token(), guarded.token(RULE)
    replace(token_file, token)
    given = {"file": {"CONSUL_HTTP_TOKEN_FILE": str(token_file)}, "environment": {"CONSUL_HTTP_TOKEN": token}}[source]
    settings = {"CONSUL_HTTP_ADDR": guarded.consul.url, "CONSUL_PROM_META": "team=a", "PYTHONDEVMODE": "1", **given}
    found: list[tuple[str, str]] = []
    with Gunicorn(workers=2, settings=settings, options=["--log-level=debug"]) as shop:
        wait_until(lambda: shop.log.read_text().count("answered 403") >= 2, within=60, what="both denied")
        assert RULE in shop.log.read_text()
        guarded.grant(token, RULE)
        wait_until(lambda: len(guarded.entries()) == 2, within=60, what="both registered")
        found += told(guarded.consul, shop)
        for entry_id in guarded.entries():
            guarded.deregister(entry_id)
        wait_until(lambda: len(guarded.entries()) == 2, within=60, what="both registered again")
        if source == "file":
            replace(token_file, later)
        guarded.delete(token)
        denied = shop.log.read_text().count("403: ACL not found")
        assert not denied
        found += told(guarded.consul, shop)
        shop.stop()
        found += written(shop.directory, but=token_file)
    assert any(where.endswith("/log") for where, _ in found)
    assert not [(where, text[:200]) for where, text in found for each in guarded.secrets if each in text]
    for entry_id in guarded.entries():  # with a token that is deleted there is no leaving
        assert source == "environment"
        guarded.deregister(entry_id)


async def test_objects(guarded: Access, make: Make, token_file: Path) -> None:
    """Settings, workers, clients and errors show no token and no password, whatever is wrong with it."""
    wrong = [guarded.unknown(), guarded.token(), "no\nheader", "k\u00f6nig"]
    guarded.secrets.update(wrong)
    shown: list[str] = []
    for secret in wrong:
        replace(token_file, secret)
        auth = f"user:{guarded.unknown()}"
        arguments = {"consul_http_addr": guarded.consul.url, "consul_http_auth": auth}
        for token in ({"consul_http_token": secret}, {"consul_http_token_file": str(token_file)}):
            shown += await _shown({**arguments, **token})
    worker: Worker = make(guarded, consul_http_token=wrong[0], consul_http_auth=f"user:{guarded.unknown()}")
    worker.start()
    await asyncio.to_thread(wait_until, lambda: "403" in about(worker), within=20, what="denied")
    shown += [repr(worker), str(worker), repr(vars(worker)), about(worker)]
    assert len(shown) > 20
    assert not [text for text in shown for each in guarded.secrets if each in text]


async def _shown(arguments: dict[str, str]) -> list[str]:
    """What the objects that know a secret, and the errors about it, say of themselves and of their causes."""
    try:
        settings = load({"service": "shop", **arguments}, environ={})
    except SettingsError as error:
        return [repr(error), *_causes(error)]
    client = AgentClient(settings)
    shown = [repr(settings), str(settings), f"{settings.consul_http_token}", repr(client), repr(vars(client))]
    calls: list[Callable[[], Awaitable[object]]] = [
        *(client.self_, lambda: client.deregister("x"), lambda: client.service("x"), lambda: client.checks("x")),
        *(lambda: client.services("x"), lambda: client.catalogue("x"), lambda: client.catalogued("x", "x", "x")),
        *(lambda: client.may_write("x"), lambda: client.deregister_from_catalogue("x", "x")),
    ]
    for call in calls:
        try:
            await call()
        except AgentError as error:
            shown += _causes(error)
    for ask_now in (
        lambda: deregister_sync(settings, "x", timeout=5),
        lambda: service_sync(settings, "x", timeout=5),
        lambda: remove_sync(settings, {"ID": "x", "Service": "x"}, timeout=5),
    ):
        try:
            ask_now()
        except AgentError as error:
            shown += _causes(error)
    await client.aclose()
    return shown


def _causes(error: BaseException | None) -> list[str]:
    shown = []
    while error:
        shown += [str(error), repr(error)]
        error = error.__cause__
    return shown


def about(worker: Worker) -> str:
    """The page on which a worker tells why it is not registered."""
    return fetch(worker.url.removesuffix("metrics")) if worker.url else ""


TOKEN = "tokenhead-\"/+&<\\ %-'tokentail"
OLD = "oldhead00-?=&gt;>#oldtail0"
PASSWORD = "pass:head \"/+&<\\  %-'passtail"
PIECES = ("tokenhead", "tokentail", "oldhead", "oldtail0", "pass:head", "passtail", "ass:hea", "okenhea")


def in_base64(piece: str) -> Iterator[str]:
    """What base64 makes of a piece, without the digits that depend on its neighbours."""
    for before in range(3):
        yield base64.b64encode((" " * before + piece).encode()).decode()[4 if before else 0 :][:8]


FRAGMENTS = {*PIECES, *(digits for piece in PIECES for digits in in_base64(piece))}
"""No encoder changes the pieces, so one in the output is a leak, whatever stands between them."""


@pytest.fixture
def echo() -> Iterator[EchoingAgent]:
    with EchoingAgent() as agent:
        yield agent


@pytest.mark.parametrize("shape", SHAPES)
async def test_echo_to_the_client(echo: EchoingAgent, token_file: Path, shape: str) -> None:
    """No error about an answer that repeats the request, and no cause of it, holds a secret or a part of one."""
    echo.shape = SHAPES[shape]
    arguments = {"consul_http_addr": echo.url, "consul_http_auth": f"user:{PASSWORD}"}
    shown = await _shown({**arguments, "consul_http_token": TOKEN})
    echo.heads.clear()  # the settings with a file know the file's tokens only
    for token in (OLD, TOKEN):
        replace(token_file, token)
        shown += await _shown({**arguments, "consul_http_token_file": str(token_file)})
    assert any(TOKEN in head for head in echo.heads)
    assert any("CONSUL_HTTP_ADDR" in text for text in shown)
    assert not leaks(shown)


@pytest.mark.parametrize("shape", SHAPES)
def test_echo_to_a_worker(
    echo: EchoingAgent, slot_directory: Path, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture, shape: str
) -> None:
    """The log and the page of a worker hold no secret that the program at the agent's address repeats."""
    echo.shape = SHAPES[shape]
    worker = Worker(
        registry=registry,
        service="shop",
        host="web-1",
        address="127.0.0.1",
        dir=slot_directory,
        consul_http_addr=echo.url,
        consul_http_token=TOKEN,
        consul_http_auth=f"user:{PASSWORD}",
    )
    worker.start()
    try:
        wait_until(lambda: "is not registered" in caplog.text, within=20, what="a line about it")
        shown = [about(worker)]
    finally:
        worker.stop()
    formatter = logging.Formatter()
    assert not leaks([*shown, *map(formatter.format, caplog.records)])


@pytest.mark.parametrize(
    "command",
    [
        ("doctor",),
        ("doctor", "--json"),
        ("list",),
        ("list", "--json"),
        ("deregister",),
        ("deregister", "--json"),
        ("deregister", "--id=shop.web-1.0"),
        ("deregister", "--all", "--json"),
        ("top", "--once"),
        ("top", "--json"),
    ],
    ids=" ".join,
)
def test_echo_to_a_command(
    echo: EchoingAgent, slot_directory: Path, token_file: Path, command: tuple[str, ...]
) -> None:
    """No command shows a secret that the program at the agent's address repeats, however it is encoded."""
    replace(token_file, TOKEN)
    env = {"CONSUL_HTTP_ADDR": echo.url, "CONSUL_PROM_SERVICE": "shop", "CONSUL_HTTP_AUTH": f"user:{PASSWORD}"}
    env |= {"CONSUL_PROM_DIR": str(slot_directory), "CONSUL_PROM_HOST": "web-1"}
    for shape in SHAPES.values():
        echo.shape = shape
        for given in ({"CONSUL_HTTP_TOKEN": TOKEN}, {"CONSUL_HTTP_TOKEN_FILE": str(token_file)}):
            result = CliRunner().invoke(cli_main.commands, command, env={**env, **given})
            assert not leaks([result.stdout, result.stderr, *_causes(result.exception)])
    assert any(TOKEN in head for head in echo.heads)


def leaks(shown: list[str]) -> list[str]:
    return [text for text in shown if any(fragment in text for fragment in FRAGMENTS)]
