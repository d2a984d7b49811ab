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
    """*deaf*: exits that do not end its workers, so that these are told again; *rough*: they are killed in these."""

    app: str
    worker_class: str
    options: Sequence[str] = (HOOKS,)
    deaf: Sequence[str] = ()
    rough: Sequence[str] = ()

    @property
    def has_hooks(self) -> bool:
        return HOOKS in self.options


DEAF, ROUGH = ("QUIT to worker", "kill -9 of master"), ("INT to master", "QUIT to master", "USR2 and QUIT")
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
    "uvicorn, hooks": Model("tests.e2e.plain:asgi", UVICORN, deaf=DEAF, rough=ROUGH),
    "uvicorn, instrument": Model("tests.e2e.set_up:asgi", UVICORN, (), deaf=DEAF, rough=ROUGH),
}
NORMAL = list(MODELS)[:2]
PARAMETERS = {name: pytest.param(name, id=name, marks=() if name in NORMAL else pytest.mark.full) for name in MODELS}
# Gunicorn's new master does not find the sockets that its workers make themselves.
UPGRADABLE = [parameter for name, parameter in PARAMETERS.items() if "--reuse-port" not in MODELS[name].options]


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


def leave(consul: Consul, shop: Shop, model: str, name: str) -> list[Gone]:
    """End workers; where nobody is left to remove what these leave, as without the hooks, the command does."""
    way = (OF_WORKERS | OF_MASTERS)[name]
    has_hooks = MODELS[model].has_hooks
    wait_until(lambda: settled(consul, shop, master=has_hooks), within=DEADLINE, what="an entry a worker")
    with Watch(consul, shop) as watch:
        way.act(watch)
        if name in MODELS[model].deaf:
            for pid in watch.pids[: way.number]:
                os.kill(pid, signal.SIGTERM)
        if name in OF_MASTERS and name != "USR2 and QUIT" and not (has_hooks or clean(model, name)):
            watch.until_ended()
            subprocess.run([sys.executable, "-m", "consul_prom", "deregister"], env=shop.environment, check=True)
            seen = watch.until_gone(way.number)  # there was no successor
            return [gone._replace(layer="command") if gone.layer == "successor" else gone for gone in seen]
        return watch.until_gone(way.number)


def clean(model: str, name: str) -> bool:
    """Whether each that ends may say farewell itself."""
    return (OF_WORKERS | OF_MASTERS)[name].clean and name not in MODELS[model].rough


def layers(model: str, name: str) -> set[str]:
    """Who may remove the entry: a worker that says farewell itself, else a sibling, the next in its slot, or others."""
    if clean(model, name):
        return {"worker"}
    return {"worker", "caretaker", "successor", "master" if MODELS[model].has_hooks else "command"}


def tell(table: list[str], model: str, name: str, seen: list[Gone]) -> None:
    layers = ", ".join(sorted({gone.layer for gone in seen}))
    table.append(f"| {model} | {name} | {layers} | {max(gone.after for gone in seen):.2f} |")


@pytest.mark.parametrize("name", OF_WORKERS)
@pytest.mark.parametrize("model", PARAMETERS.values(), indirect=True, scope="module")
def test_worker(consul: Consul, shop: Shop, model: str, name: str, table: list[str]) -> None:
    """A worker that may say farewell does so itself; what another leaves is removed, and the others' entries stay."""
    seen = leave(consul, shop, model, name)
    tell(table, model, name, seen)
    assert {gone.layer for gone in seen} <= layers(model, name)
    wait_until(
        lambda: settled(consul, shop, master=MODELS[model].has_hooks), within=DEADLINE, what="an entry a worker again"
    )


@pytest.mark.parametrize("name", OF_MASTERS)
@pytest.mark.parametrize("model", UPGRADABLE, indirect=True, scope="module")
def test_master(second_consul: Consul, model: str, name: str, table: list[str]) -> None:
    """The same where the server ends: then no entry is left, the master's own included."""
    consul = second_consul
    with Shop(MODELS[model], consul) as shop:
        seen = leave(consul, shop, model, name)
        tell(table, model, name, seen)
        for pid in workers_of(entries(consul)).values():  # after an upgrade: the new master is nobody's child
            os.kill(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGTERM)
            break
        wait_until(lambda: not entries(consul), within=DEADLINE, what="no entry")
        assert {gone.layer for gone in seen} <= layers(model, name)
