"""No secret is in anything that a run writes, shows or tells, whatever went wrong in it."""

import asyncio
from pathlib import Path

import pytest

from consul_prom.client import AgentClient
from consul_prom.errors import AgentError, SettingsError
from consul_prom.settings import load
from consul_prom.snippets import write_rule
from consul_prom.wire import deregister_now
from consul_prom.worker import Worker
from tests.acl.access import Access, Make, replace
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
    for call in (client.self_, lambda: client.deregister("x"), lambda: client.service("x"), lambda: client.checks("x")):
        try:
            await call()
        except AgentError as error:
            shown += _causes(error)
    try:
        deregister_now(settings, "x", timeout=5)
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
