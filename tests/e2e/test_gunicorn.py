"""Gunicorn with nothing but its hooks: every worker class, and what only the master knows."""

import os
import re
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.e2e.exits import entries, workers_of
from tests.services.consul import Consul
from tests.services.gunicorn import HOOKS, Gunicorn
from tests.services.waiting import wait_until

WORKERS = 2
DEADLINE = 60.0
HOST = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
AIOHTTP = ("tests.e2e.plain:aiohttp_app", "aiohttp.GunicornWebWorker")
MODELS = {
    "aiohttp": AIOHTTP,
    "aiohttp, preloaded": (*AIOHTTP, "--preload"),
    "aiohttp, set up in code too": ("tests.e2e.set_up:aiohttp_app", "aiohttp.GunicornWebWorker"),
    "uvloop": ("tests.e2e.plain:aiohttp_app", "aiohttp.GunicornUVLoopWebWorker"),
    "sync": ("tests.e2e.plain:wsgi", "sync"),
    "sync, reloader": ("tests.e2e.plain:wsgi", "sync", "--reload"),
    "gthread": ("tests.e2e.plain:wsgi", "gthread", "--threads=2"),
    "gevent": ("tests.e2e.plain:wsgi", "gevent"),
    "uvicorn": ("tests.e2e.plain:asgi", "uvicorn_worker.UvicornWorker"),
}


@pytest.fixture(scope="module")
def consul() -> Iterator[Consul]:
    with Consul() as agent:
        yield agent


def server(consul: Consul, app: str, worker_class: str, *options: str, **settings: str) -> Gunicorn:
    ours = {"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_ADDRESS": consul.address, "CONSUL_PROM_SERVICE": "shop"}
    return Gunicorn(
        app,
        workers=WORKERS,
        worker_class=worker_class,
        settings={**ours, **settings},
        options=(*(() if "-c" in " ".join(options) else HOOKS), *options),
    )


def settled(consul: Consul, *shops: Gunicorn) -> bool:
    """Whether each worker has an entry, and the masters have one together."""
    found = entries(consul)
    pids = workers_of(found)
    alive = set().union(*(shop.workers() for shop in shops))
    return (
        len(pids) == len(alive) == WORKERS * len(shops)
        and set(pids.values()) == alive
        and f"shop.{HOST}.master" in found
    )


def replaced(consul: Consul, shop: Gunicorn, killed: int) -> bool:
    return killed not in shop.workers() and settled(consul, shop)


def page(consul: Consul, slot: str) -> str:
    entry = entries(consul)[f"shop.{HOST}.{slot}"]
    with urllib.request.urlopen(f"http://{entry['Address']}:{entry['Port']}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def shows(consul: Consul, *lines: str) -> bool:
    try:
        found = page(consul, "master")
    except (OSError, KeyError):
        return False  # it moves to another worker's caretaker
    return all(line in found for line in lines)


def descriptors(pid: int) -> list[str]:
    return [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_worker_classes(consul: Consul, model: tuple[str, ...]) -> None:
    """With no line of code each worker is a target, the master keeps nothing of ours open, and a stop leaves none."""
    with server(consul, *model) as shop:
        wait_until(lambda: settled(consul, shop), within=DEADLINE, what="an entry a worker and one of the master")
        for slot in range(WORKERS):
            found = page(consul, str(slot))
            assert "consul_prom_registered 1.0" in found
            assert 'gunicorn_log_lines_total{level="error"} 0.0' in found
        assert shows(consul, 'gunicorn_workers_wanted{master="0"} 2.0', 'gunicorn_workers{master="0"} 2.0')
        assert len(list(Path(f"/proc/{shop.pid}/task").iterdir())) == 1, "no thread"
        assert sum(link.startswith("socket:") for link in descriptors(shop.pid)) == 1, "the application's"
        assert not any("slots" in link for link in descriptors(shop.pid)), "no lock"
        assert shop.stop() == 0
        assert not entries(consul)
        assert not re.search("Traceback|Warning|consul-prom is off", shop.log.read_text()), shop.log.read_text()


def test_adoption(consul: Consul) -> None:
    """The workers of a reload have other slots; a sibling serves what the old ones counted, until newborns come."""

    def adopted() -> dict[str, int]:
        return {key[-1]: entry["Port"] for key, entry in entries(consul).items() if "adopted" in entry["Meta"]}

    with server(consul, *AIOHTTP) as shop:
        wait_until(lambda: settled(consul, shop), within=DEADLINE, what="the entries")
        before = {key[-1]: entry["Port"] for key, entry in entries(consul).items() if not key.endswith(".master")}
        scrapes = re.search("^consul_prom_registrations_total.* 1.0$", page(consul, "0"), re.MULTILINE)
        assert scrapes
        reload_side_by_side(consul, shop)
        wait_until(lambda: adopted() == before, within=DEADLINE, what="the old slots adopted, on their ports")
        assert scrapes[0] in page(consul, "0")
        assert sorted(workers_of(entries(consul))) == [f"shop.{HOST}.2", f"shop.{HOST}.3"]
        os.kill(shop.pid, signal.SIGHUP)
        wait_until(lambda: sorted(adopted()) == ["2", "3"], within=DEADLINE, what="the newborns in the smallest slots")
        assert sorted(workers_of(entries(consul))) == [f"shop.{HOST}.0", f"shop.{HOST}.1"]
        assert shop.stop() == 0
        assert not entries(consul)


def reload_side_by_side(consul: Consul, shop: Gunicorn) -> None:
    """Reload so that the old workers end after the new ones have their slots, however busy the machine is."""
    old = shop.workers()
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    os.kill(shop.pid, signal.SIGHUP)
    wait_until(lambda: len(workers_of(entries(consul))) == 2 * len(old), within=DEADLINE, what="the new workers")
    for pid in old:
        os.kill(pid, signal.SIGCONT)


def test_exits_are_counted(consul: Consul) -> None:
    """What became of workers is on the master's page, whichever worker serves that now, and so are the lines logged."""
    exits = 'gunicorn_worker_exits_total{master="0",reason='
    with server(consul, *AIOHTTP, "--timeout=2", "--max-requests=20") as shop:
        wait_until(lambda: settled(consul, shop), within=DEADLINE, what="the entries")
        os.kill(min(shop.workers()), signal.SIGKILL)
        wait_until(lambda: shows(consul, exits + '"signal",signal="SIGKILL"} 1.0'), within=DEADLINE, what="kill -9")
        os.kill(min(shop.workers()), signal.SIGSTOP)
        wait_until(lambda: shows(consul, exits + '"timeout",signal="SIGKILL"} 1.0'), within=DEADLINE, what="a time-out")
        assert shows(consul, 'gunicorn_log_lines_total{level="critical",master="0"} 1.0')
        os.kill(shop.pid, signal.SIGTTIN)
        wait_until(lambda: shows(consul, 'gunicorn_workers{master="0"} 3.0'), within=DEADLINE, what="three workers")
        os.kill(shop.pid, signal.SIGTTOU)
        wait_until(lambda: shows(consul, exits + '"stop",signal=""} 1.0'), within=DEADLINE, what="a scale-down")
        assert shows(consul, 'gunicorn_workers_wanted{master="0"} 2.0')

        def worn() -> bool:
            with suppress(ConnectionError):  # of a worker that has had its last request
                shop.get("/pid")
            return not shows(consul, exits + '"max_requests",signal=""} 0.0')

        wait_until(worn, within=DEADLINE, what="max_requests")


def test_two_masters(consul: Consul) -> None:
    """Two Gunicorns of one service share the slots, and their masters one page; it goes with the last of them."""
    first = server(consul, *AIOHTTP)
    with first, server(consul, *AIOHTTP, CONSUL_PROM_DIR=str(first.directory / "slots")) as second:
        wait_until(lambda: settled(consul, first, second), within=DEADLINE, what="an entry a worker")
        for number in (0, 1):
            assert shows(consul, f'gunicorn_workers{{master="{number}"}} 2.0')
        first.stop()
        wait_until(lambda: settled(consul, second), within=DEADLINE, what="the second's entries")
        wait_until(lambda: shows(consul, 'gunicorn_workers{master="1"} 2.0'), within=DEADLINE, what="the page")
        assert not shows(consul, 'gunicorn_workers{master="0"}')
        second.stop()
        assert not entries(consul)


CONFIGURATION = """
import os
import pathlib
import consul_prom

proc_name = "theirs"

def post_worker_init(worker):
    os.environ["CONSUL_PROM_SERVICE"] = "shop"

def worker_exit(server, worker):
    pathlib.Path("exits").open("a").write(f"{worker.pid}\\n")
"""


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "beside"])
def test_configuration_file(consul: Consul, *, installed: bool) -> None:
    """The user's own configuration and hooks work, whether ours are installed in it or it lies beside."""
    shop = server(consul, *AIOHTTP, *(["-c=gunicorn.conf.py"] if installed else []), CONSUL_PROM_SERVICE="")
    text = CONFIGURATION + ("consul_prom.gunicorn.install(globals())\n" if installed else "")
    (shop.directory / "gunicorn.conf.py").write_text(text)
    with shop:
        wait_until(lambda: len(workers_of(entries(consul))) == WORKERS, within=DEADLINE, what="the entries")
        workers = shop.workers()
        shop.stop()
        assert not entries(consul)
        assert {int(pid) for pid in (shop.directory / "exits").read_text().split()} == workers


def test_forked_child(consul: Consul) -> None:
    """A child that a worker forks, and that ends through Gunicorn's code, changes nothing on the master's page."""
    exits = 'gunicorn_worker_exits_total{master="0",reason="stop",signal=""} '
    with server(consul, *MODELS["sync"]) as shop:
        wait_until(lambda: settled(consul, shop), within=DEADLINE, what="the entries")
        wait_until(lambda: shows(consul, 'gunicorn_workers{master="0"} 2.0'), within=DEADLINE, what="the page")
        shop.call("/fork")
        wait_until(lambda: "forked child has ended" in shop.log.read_text(), within=DEADLINE, what="the child's end")
        assert shows(consul, 'gunicorn_workers{master="0"} 2.0', exits + "0.0")
        assert settled(consul, shop)


@pytest.mark.parametrize("name", ["on_starting", "post_worker_init", "worker_exit"])
def test_installed_first(consul: Consul, name: str) -> None:
    """A hook that a later line replaces is told of, and the entries are gone all the same when the server ends."""
    shop = server(consul, *AIOHTTP, "-c=gunicorn.conf.py")
    (shop.directory / "gunicorn.conf.py").write_text(
        f"import consul_prom\nconsul_prom.gunicorn.install(globals())\ndef {name}(*_): ...\n".replace(
            "*_", "worker" if name == "post_worker_init" else "server" + ", worker" * (name == "worker_exit")
        )
    )
    with shop:
        served = WORKERS * (name != "post_worker_init")
        wait_until(lambda: len(workers_of(entries(consul))) == served, within=DEADLINE, what="the entries")
        shop.stop()
        assert not entries(consul)
        assert f"last line of gunicorn.conf.py: {name} was replaced by it" in shop.log.read_text()


@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["each", "preloaded"])
def test_counted_at_import(consul: Consul, options: tuple[str, ...]) -> None:
    """What is counted at an import is counted for each that a worker does; its master's is on the master's page."""
    with server(consul, *MODELS["sync"], *options) as shop:
        wait_until(lambda: settled(consul, shop), within=DEADLINE, what="the entries")
        for generation in (1, 2):
            assert f"imports_total {0.0 if options else generation}" in page(consul, "0")
            killed = workers_of(entries(consul))[f"shop.{HOST}.0"]
            os.kill(killed, signal.SIGKILL)
            wait_until(partial(replaced, consul, shop, killed), within=DEADLINE, what="the next worker's entry")
        assert shows(consul, 'imports_total{master="0"} 1.0') == bool(options)


def test_no_service(consul: Consul) -> None:
    """Without a service the hooks say so once, and serve nobody."""
    with server(consul, *AIOHTTP, CONSUL_PROM_SERVICE="") as shop:
        assert shop.get("/pid")
        shop.stop()
        assert shop.log.read_text().count("CONSUL_PROM_SERVICE") == 1


@pytest.mark.parametrize("model", [AIOHTTP, MODELS["sync"]], ids=["aiohttp", "sync"])
def test_reload(consul: Consul, tmp_path: Path, model: tuple[str, ...]) -> None:
    """When a file changes, the entries are those of the workers that the reloader's exits made room for."""
    watched = tmp_path / "watched"
    watched.touch()
    with server(consul, *model[:2], "--reload", f"--reload-extra-file={watched}") as shop:
        wait_until(lambda: settled(consul, shop), within=DEADLINE, what="the entries")
        before = shop.workers()

        def renewed() -> bool:
            if before & shop.workers():
                watched.touch()
            return settled(consul, shop) and not before & shop.workers()

        wait_until(renewed, within=DEADLINE, what="the next workers' entries")
        shop.stop()
        assert not entries(consul)


def test_required(consul: Consul) -> None:
    """Where consul-prom is required, a worker that cannot be registered does not come up, and the server says why."""
    shop = server(
        consul,
        *AIOHTTP,
        CONSUL_PROM_REQUIRED="true",
        CONSUL_PROM_START_TIMEOUT="0.5",
        CONSUL_HTTP_ADDR="127.0.0.1:1",
    )
    with pytest.raises(AssertionError, match="not registered within CONSUL_PROM_START_TIMEOUT"):
        shop.start()
    assert not entries(consul)


def test_hanging_agent() -> None:
    """While the agent hangs, the master replaces workers that are killed as ever, and its stop is not held up."""
    with Consul() as agent, server(agent, *AIOHTTP) as shop:
        wait_until(lambda: settled(agent, shop), within=DEADLINE, what="the entries")
        agent.pause()
        for _ in range(3):
            before = shop.workers()
            os.kill(min(before), signal.SIGKILL)
            wait_until(lambda old=before: shop.workers() - old, within=20, what="another worker")  # type: ignore[misc]
        assert shop.get("/pid")
        shop.stop(within=40)
        agent.resume()


@pytest.mark.parametrize("model", [AIOHTTP, MODELS["sync"]], ids=["aiohttp", "sync"])
def test_short_grace(model: tuple[str, ...]) -> None:
    """While the agent hangs, no worker is killed for our sake, however long STOP_TIMEOUT is."""
    agent = Consul()
    shop = server(agent, *model, "--graceful-timeout=3", CONSUL_PROM_STOP_TIMEOUT="20")
    (shop.directory / "gunicorn.conf.py").write_text(CONFIGURATION)
    with agent, shop:
        wait_until(lambda: settled(agent, shop), within=DEADLINE, what="the entries")
        workers = shop.workers()
        agent.pause()
        os.kill(shop.pid, signal.SIGQUIT)
        wait_until(lambda: not shop.running, within=DEADLINE, what="its end")
        assert len(re.findall(r"shop\.\S+\.\d may still be registered", shop.log.read_text())) == WORKERS
        assert {int(pid) for pid in (shop.directory / "exits").read_text().split()} == workers


def time_out(shop: Gunicorn) -> None:
    """A request that takes longer than Gunicorn's time-out, which then gives its worker about a second."""
    with suppress(OSError, HTTPException):
        shop.call("/nap?seconds=50", timeout=DEADLINE)


def stop_quickly(shop: Gunicorn) -> None:
    """The second Ctrl-C, by which Gunicorn gives its workers two seconds."""
    os.kill(shop.pid, signal.SIGTERM)
    wait_until(lambda: "Handling signal: term" in shop.log.read_text(), within=DEADLINE, what="the first")
    os.kill(shop.pid, signal.SIGINT)


@pytest.mark.parametrize(
    ("model", "act", "number"),
    [
        ((*MODELS["sync"], "--timeout=6"), time_out, 1),
        (MODELS["sync"], stop_quickly, WORKERS),
        (AIOHTTP, stop_quickly, WORKERS),
    ],
    ids=["sync, time-out", "sync, quick", "aiohttp, quick"],
)
def test_given_a_moment(model: tuple[str, ...], act: Callable[[Gunicorn], None], number: int) -> None:
    """While the agent hangs, a worker that Gunicorn gives no more than a moment ends within that: nobody kills it."""
    agent = Consul()
    shop = server(agent, *model, CONSUL_PROM_STOP_TIMEOUT="5")
    (shop.directory / "gunicorn.conf.py").write_text(CONFIGURATION)
    with agent, shop:
        wait_until(lambda: settled(agent, shop), within=DEADLINE, what="the entries")
        workers = shop.workers()

        def gone() -> set[int]:
            return workers - (shop.workers() if shop.running else set())

        agent.pause()
        act(shop)
        wait_until(lambda: len(gone()) == number, within=DEADLINE, what="the end")
        exits = shop.directory / "exits"
        assert exits.exists(), "the user's hook comes after ours"
        assert {int(pid) for pid in exits.read_text().split()} == gone()


@pytest.mark.parametrize(
    ("app", "settings", "line"),
    [
        (
            "tests.e2e.shop:get_application",
            {"CONSUL_PROM_SERVICE": "shop", "CONSUL_PROM_PORT": "many"},
            "ERROR] consul-prom is off: CONSUL_PROM_PORT='many' must be",
        ),
        (
            "tests.e2e.plain:aiohttp_app",
            {"CONSUL_PROM_SERVICE": "my_shop"},
            "ERROR] consul-prom is off: CONSUL_PROM_SERVICE='my_shop' must be",
        ),
        ("tests.e2e.plain:aiohttp_app", {}, "WARNING] CONSUL_PROM_SERVICE is not set: "),
    ],
    ids=["wrong port, set up in code too", "wrong name", "no name"],
)
def test_wrong_setting_is_logged_once(app: str, settings: dict[str, str], line: str) -> None:
    """A wrong setting is one line of the whole server, in Gunicorn's format, although each worker reads it."""
    with Gunicorn(app, workers=WORKERS, settings=settings, options=HOOKS) as shop:
        shop.stop()
        ours = [text for text in shop.log.read_text().splitlines() if "consul-prom" in text or "CONSUL_PROM" in text]
    assert len(ours) == 1, ours
    assert re.match(r"\[20\S+ \S+ \S+\] \[\d+\] \[" + re.escape(line), ours[0])
