"""What runs Python without Gunicorn: its ends are clean where it may say farewell, and its dead are looked after."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from consul_prom.process.identity import process_identity
from tests import ROOT
from tests.e2e.exits import DEADLINE, LOGGING, entries, workers_of
from tests.services.consul import Consul
from tests.services.program import Program
from tests.services.waiting import wait_until

SCRIPT = """
import sys
import consul_prom

with consul_prom.running(service="shop") as worker:
    print("ready", flush=True)
    if input() == "crash":
        raise LookupError("mine")
"""
POOL = """
import multiprocessing, os, signal, time
import consul_prom

def begin():
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = consul_prom.Worker(service="shop")
    worker.start()

def work(number):
    return os.getpid()

if __name__ == "__main__":
    with multiprocessing.get_context("{method}").Pool(3, begin) as pool:
        while True:
            pool.map(work, range(30))
            time.sleep(0.1)
"""


class Server(Program):
    """A program of Python's, with its slots in its directory."""

    name = "python"

    def __init__(self, consul: Consul, arguments: Sequence[str], *, count: int = 1) -> None:
        super().__init__(address=None, binary=Path(sys.executable), env=None)
        self.url = f"http://{self.address}:8000"
        self._consul = consul
        self._given = arguments
        self._count = count
        (self.directory / "gunicorn.conf.py").write_text(LOGGING)
        self._env |= {
            "PYTHONPATH": str(ROOT),
            "CONSUL_PROM_DIR": str(self.directory / "slots"),
            "CONSUL_HTTP_ADDR": consul.url,
            "CONSUL_PROM_ADDRESS": consul.address,
            "CONSUL_PROM_LINGER": "0",  # nobody scrapes
        }

    def _arguments(self) -> Sequence[str]:
        return [part.format(address=self.address) for part in self._given]

    def _ready(self) -> bool:
        return len(self.pids()) == self._count

    def pids(self) -> set[int]:
        return set(workers_of(entries(self._consul)).values())

    def sweep(self, *options: str) -> str:
        """The command as systemd's ExecStopPost=, or a preStop of Kubernetes', runs it: by path, with nothing about."""
        command = [str(Path(sys.executable).with_name("consul-prom")), "deregister", "--service=shop", *options]
        environment = {name: value for name, value in self._env.items() if name.startswith("CONSUL_")}
        return subprocess.run(command, env=environment, check=True, cwd="/", capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def consul() -> Iterator[Consul]:
    with Consul() as agent:
        yield agent


@pytest.fixture
def serve(consul: Consul) -> Iterator[Callable[..., Server]]:
    """Starts a program and waits for its entries."""
    servers: list[Server] = []

    def run(*arguments: str, count: int = 1) -> Server:
        servers.append(Server(consul, arguments, count=count))
        return servers[-1].start()

    yield run
    for server in servers:
        server.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_run_app(consul: Consul, serve: Callable[..., Server], number: int) -> None:
    """Aiohttp's own server says farewell on each signal that it hears of; the command sees to the other."""
    server = serve("-m", "tests.e2e.set_up", "{address}")
    os.kill(server.pid, number)
    wait_until(lambda: not server.running, within=DEADLINE, what="its end")
    if number == signal.SIGKILL:
        assert entries(consul)
        assert "1 removed" in server.sweep()
    assert not entries(consul)


def test_pre_stop(consul: Consul, serve: Callable[..., Server]) -> None:
    """Told to remove all of this host and service, alive or not, the command says that the living come back."""
    server = serve("-m", "tests.e2e.set_up", "{address}")
    assert "registers again" in server.sweep("--all")
    wait_until(server.pids, within=DEADLINE, what="its entry again")
    assert server.stop() == 0
    assert not entries(consul)


def script(consul: Consul, directory: Path, **more: str) -> subprocess.Popen[str]:
    """A job that has begun; *more* is its environment."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CONSUL_PROM_DIR": str(directory),
        "CONSUL_HTTP_ADDR": consul.url,
        "CONSUL_PROM_ADDRESS": consul.address,
        **more,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    wait_until(lambda: process.pid in workers_of(entries(consul)).values(), within=DEADLINE, what="its entry")
    return process


@pytest.mark.parametrize("end", ["end", "crash"])
def test_script(consul: Consul, slot_directory: Path, end: str) -> None:
    """A job leaves no entry, however its last line went."""
    with script(consul, slot_directory, CONSUL_PROM_LINGER="0") as process:
        process.communicate(f"{end}\n", timeout=DEADLINE)
    assert process.returncode == (end == "crash")
    assert not entries(consul)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_stopped_script(consul: Consul, slot_directory: Path, number: int) -> None:
    """Nor does one that is told to end, which it does as if we were not there."""
    with script(consul, slot_directory) as process:  # whose LINGER is a minute
        process.send_signal(number)
        assert process.wait(DEADLINE) == -number
    assert not entries(consul)


def test_killed_script(consul: Consul, slot_directory: Path) -> None:
    """What a killed job leaves, another that runs removes."""
    with script(consul, slot_directory) as killed, script(consul, slot_directory, CONSUL_PROM_LINGER="0") as other:
        killed.kill()
        wait_until(
            lambda: set(workers_of(entries(consul)).values()) == {other.pid}, within=DEADLINE, what="its entry gone"
        )
        other.communicate("end\n", timeout=DEADLINE)
    assert not entries(consul)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pool(consul: Consul, serve: Callable[..., Server], tmp_path: Path, method: str) -> None:
    """Each process of a pool is a target; one that is killed is replaced; what is left of all, the command removes."""
    file = tmp_path / "pool.py"
    file.write_text(POOL.replace("{method}", method))
    server = serve(str(file), count=3)
    before = server.pids()
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    wait_until(
        lambda: killed not in server.pids() and len(server.pids()) == 3, within=DEADLINE, what="another in its place"
    )
    left = server.pids()
    server.stop()
    for pid in left:  # which outlive a parent that a signal ends
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(process_identity, left)), within=DEADLINE, what="the end")
    server.sweep()
    assert not entries(consul)


@pytest.mark.parametrize("end", ["terminate", "close"])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_end_of_pool(consul: Consul, serve: Callable[..., Server], tmp_path: Path, method: str, end: str) -> None:
    """The processes of a pool that ends, of itself or told by its ``with``, leave no entry."""
    file = tmp_path / "pool.py"
    loop = POOL.replace("{method}", method).replace("while True:", "while not os.path.exists('over'):")
    file.write_text(loop + f"        pool.{end}()\n        pool.join()\n")
    server = serve(str(file), count=3)
    (server.directory / "over").touch()
    wait_until(lambda: not server.running, within=DEADLINE, what="its end")
    assert not entries(consul)
    assert "Traceback" not in server.log.read_text()


SERVERS = {
    "uvicorn": ("-m", "uvicorn", "tests.e2e.set_up:asgi", "--host={address}", "--port=8000", "--workers=2"),
    "hypercorn": ("-m", "hypercorn", "tests.e2e.set_up:asgi", "--bind={address}:8000", "--workers=2"),
}


@pytest.mark.parametrize("arguments", SERVERS.values(), ids=SERVERS.keys())
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_supervised(consul: Consul, serve: Callable[..., Server], arguments: Sequence[str], number: int) -> None:
    """Workers of the servers that have their own supervisor say farewell."""
    server = serve(*arguments, count=2)
    os.kill(server.pid, number)
    wait_until(lambda: not server.running, within=DEADLINE, what="its end")
    assert not entries(consul)


def test_supervised_and_blocked(consul: Consul, serve: Callable[..., Server]) -> None:
    """A worker that Hypercorn ends by SIGTERM, as it does when the first of them has left, says farewell itself."""
    server = serve(*SERVERS["hypercorn"], count=2)
    blocked = ThreadPoolExecutor(1).submit(server.call, "/block?seconds=20", timeout=DEADLINE)
    time.sleep(0.5)  # it shall have arrived
    os.kill(server.pid, signal.SIGTERM)
    wait_until(lambda: not server.running, within=DEADLINE, what="its end")
    assert not entries(consul)
    with pytest.raises((OSError, HTTPException)):
        blocked.result(DEADLINE)


def test_reloader(consul: Consul, serve: Callable[..., Server]) -> None:
    """When a file changes, the reloader's next process has the entry, and a stop leaves none."""
    server = serve(*(part for part in SERVERS["uvicorn"] if part != "--workers=2"), "--reload")
    (before,) = server.pids()
    (server.directory / "gunicorn.conf.py").touch()
    wait_until(lambda: server.pids() and before not in server.pids(), within=DEADLINE, what="the next process")
    assert server.stop() == 0
    assert not entries(consul)


@pytest.mark.parametrize("arguments", SERVERS.values(), ids=SERVERS.keys())
def test_supervised_and_killed(consul: Consul, serve: Callable[..., Server], arguments: Sequence[str]) -> None:
    """A killed worker's entry goes; where the server ends with it, as Hypercorn does, the command removes it."""
    server = serve(*arguments, count=2)
    killed = min(server.pids())
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: killed not in server.pids() or not server.running, within=DEADLINE, what="the entry gone")
    if not server.running:
        server.sweep()
    assert killed not in server.pids()
    server.stop()
    assert not entries(consul)
