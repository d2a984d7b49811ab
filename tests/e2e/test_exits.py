"""Every worker model and every exit: nothing is left behind, and who sees to that, and when."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.exits import (
    DEADLINE,
    LOGGING,
    MAX_REQUESTS,
    OF_MASTERS,
    OF_WORKERS,
    WORKERS,
    Exit,
    Gone,
    Watch,
    entries,
    workers_of,
)
from tests.services.consul import Consul
from tests.services.gunicorn import Gunicorn
from tests.services.waiting import wait_until

HOOKS = "-c=python:consul_prom.gunicorn"


class Model(NamedTuple):
    app: str
    worker_class: str
    options: Sequence[str] = (HOOKS,)

    @property
    def has_hooks(self) -> bool:
        return HOOKS in self.options


AIOHTTP, UVICORN = "aiohttp.GunicornWebWorker", "uvicorn_worker.UvicornWorker"
MODELS = {
    "aiohttp, hooks": Model("tests.e2e.plain:aiohttp_app", AIOHTTP),
    "sync, hooks": Model("tests.e2e.plain:wsgi", "sync"),
    "aiohttp, setup": Model("tests.e2e.set_up:aiohttp_app", AIOHTTP, ()),
    "aiohttp, both": Model("tests.e2e.set_up:aiohttp_app", AIOHTTP),
    "aiohttp, hooks, preload": Model("tests.e2e.plain:aiohttp_app", AIOHTTP, (HOOKS, "--preload")),
    "aiohttp, hooks, reuse_port": Model("tests.e2e.plain:aiohttp_app", AIOHTTP, (HOOKS, "--reuse-port")),
    "uvloop, hooks": Model("tests.e2e.plain:aiohttp_app", "aiohttp.GunicornUVLoopWebWorker"),
    "gthread, hooks": Model("tests.e2e.plain:wsgi", "gthread", (HOOKS, "--threads=4")),
    "gevent, hooks": Model("tests.e2e.plain:wsgi", "gevent"),
    "uvicorn, hooks": Model("tests.e2e.plain:asgi", UVICORN),
    "uvicorn, instrument": Model("tests.e2e.set_up:asgi", UVICORN, ()),
}
NORMAL = list(MODELS)[:2]
PARAMETERS = [pytest.param(name, id=name, marks=() if name in NORMAL else pytest.mark.full) for name in MODELS]


class Shop(Gunicorn):
    """Started by its script, so that it can be started anew by USR2; its log says who removes an entry."""

    def __init__(self, model: Model, consul: Consul) -> None:
        super().__init__(
            model.app,
            workers=WORKERS,
            worker_class=model.worker_class,
            settings={
                "CONSUL_HTTP_ADDR": consul.url,
                "CONSUL_PROM_ADDRESS": consul.address,
                "CONSUL_PROM_SERVICE": "shop",
            },
            options=(
                *model.options,
                "--timeout=3",
                "--graceful-timeout=3",
                f"--max-requests={MAX_REQUESTS}",
                "--no-control-socket",
            ),
        )
        (self.directory / "gunicorn.conf.py").write_text(LOGGING)

    @property
    def environment(self) -> Mapping[str, str]:
        return self._env

    def _arguments(self) -> Sequence[str]:
        _module, _name, *rest = super()._arguments()
        return [str(Path(sys.executable).with_name("gunicorn")), *rest]


@pytest.fixture(scope="module")
def consul() -> Iterator[Consul]:
    with Consul() as agent:
        yield agent


@pytest.fixture(scope="module")
def second_consul() -> Iterator[Consul]:
    """For what must not meet the server that the other tests share."""
    with Consul() as agent:
        yield agent


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """What was seen, for who runs this with ``-s``."""
    rows = ["| model | exit | layer | gone, s after the end |", "|---|---|---|---|"]
    yield rows
    print("", *rows, sep="\n")


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shop(consul: Consul, model: str) -> Iterator[Shop]:
    """One server for all exits that it outlives."""
    with Shop(MODELS[model], consul) as shop:
        yield shop
        assert shop.running
    assert not entries(consul)


def settled(consul: Consul, shop: Shop, *, master: bool) -> bool:
    """Whether the entries are those of the live workers, and of the master where it has a page."""
    found = entries(consul)
    pids = workers_of(found)
    has_page = any(key.endswith(".master") for key in found)
    return len(pids) == WORKERS and set(pids.values()) == shop.workers() and has_page == master


def leave(consul: Consul, shop: Shop, model: str, way: Exit, *, command: bool = False) -> list[Gone]:
    has_hooks = MODELS[model].has_hooks
    wait_until(lambda: settled(consul, shop, master=has_hooks), within=DEADLINE, what="an entry a worker")
    with Watch(consul, shop) as watch:
        way.act(watch)
        if command:
            watch.until_ended()
            subprocess.run([sys.executable, "-m", "consul_prom", "deregister"], env=shop.environment, check=True)
        return watch.until_gone(way.number)


def tell(table: list[str], model: str, name: str, seen: list[Gone]) -> None:
    layers = ", ".join(sorted({gone.layer for gone in seen}))
    table.append(f"| {model} | {name} | {layers} | {max(gone.after for gone in seen):.2f} |")


@pytest.mark.parametrize("name", OF_WORKERS)
@pytest.mark.parametrize("model", PARAMETERS, indirect=True, scope="module")
def test_worker(consul: Consul, shop: Shop, model: str, name: str, table: list[str]) -> None:
    """A worker that may say farewell does so itself; what another leaves is removed, and the others' entries stay."""
    seen = leave(consul, shop, model, OF_WORKERS[name])
    tell(table, model, name, seen)
    assert not OF_WORKERS[name].clean or {gone.layer for gone in seen} == {"worker"}
    wait_until(
        lambda: settled(consul, shop, master=MODELS[model].has_hooks), within=DEADLINE, what="an entry a worker again"
    )


@pytest.mark.parametrize("name", OF_MASTERS)
@pytest.mark.parametrize("model", PARAMETERS, indirect=True, scope="module")
def test_master(second_consul: Consul, model: str, name: str, table: list[str]) -> None:
    """The same where the server ends: then no entry is left, the master's own included.

    Where nobody is left to see to that, as without the hooks, the command does.
    """
    consul, abandoned = second_consul, not (MODELS[model].has_hooks or OF_MASTERS[name].clean)
    with Shop(MODELS[model], consul) as shop:
        seen = leave(consul, shop, model, OF_MASTERS[name], command=abandoned)
        tell(table, model, name, seen)
        for pid in workers_of(entries(consul)).values():  # after an upgrade: the new master is nobody's child
            os.kill(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGTERM)
            break
        wait_until(lambda: not entries(consul), within=DEADLINE, what="no entry")
        assert not OF_MASTERS[name].clean or {gone.layer for gone in seen} == {"worker"}
