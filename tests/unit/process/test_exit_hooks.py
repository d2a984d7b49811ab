"""What a worker that nobody stops does at its process' end, and that nobody else's end is changed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from consul_prom.devagent import DevAgent, Fault
from consul_prom.slots import slots
from tests.services.workers import PACKAGE, Workers

BEGIN = """
import multiprocessing.util, os, signal, sys, time
from consul_prom.process import exit_hooks

def tell(word):
    print(word, flush=True)

def stop():
    with exit_hooks.said(stop):
        tell("begun")
        time.sleep(float(sys.argv[1]))
        tell("said")
"""
Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run() -> Iterator[Run]:
    """Starts a script, which has a `stop` that takes some *seconds*."""
    processes: list[subprocess.Popen[str]] = []

    def run(script: str, *, seconds: float = 0) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", BEGIN + script, str(seconds)]
        processes.append(
            subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(PACKAGE)}, stdout=subprocess.PIPE, text=True)
        )
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def hears(process: "subprocess.Popen[str]", word: str) -> bool:
    assert process.stdout
    return process.stdout.readline() == f"{word}\n"


def rest(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Its exit code, and what it says until then."""
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_end_of_python(run: Run) -> None:
    """It is said as Python exits, and once."""
    assert rest(run("exit_hooks.expect(stop)")) == (0, "begun\nsaid\n")


def test_dies_at_exit(run: Run) -> None:
    """A process may die of a signal where Python would exit: after all is said and the application's own exit hooks."""
    script = """
import atexit
exit_hooks.expect(stop)
exit_hooks.die_at_exit(signal.SIGINT)
atexit.register(tell, "application")
"""
    assert rest(run(script)) == (-signal.SIGINT, "application\nbegun\nsaid\n")


def test_child_exits(run: Run) -> None:
    """A forked child exits as Python does, whatever its parent dies of."""
    script = """
exit_hooks.die_at_exit(signal.SIGTERM)
child = os.fork()
if child:
    tell(os.waitpid(child, 0)[1])
"""
    assert rest(run(script)) == (-signal.SIGTERM, "0\n")


def test_several(run: Run) -> None:
    """Each worker of a process says its own."""
    script = """
def other():
    with exit_hooks.said(other):
        tell("other")

exit_hooks.expect(stop)
exit_hooks.expect(other)
signal.raise_signal(signal.SIGTERM)
"""
    assert rest(run(script)) == (-signal.SIGTERM, "begun\nsaid\nother\n")


def test_nothing_due(run: Run) -> None:
    """What has been said is not said again, and the signal's handling is as before."""
    script = "exit_hooks.expect(stop); stop(); tell(signal.getsignal(signal.SIGTERM).name)"
    assert rest(run(script)) == (0, "begun\nsaid\nSIG_DFL\n")


def test_signal(run: Run) -> None:
    """It is said before the process dies of SIGTERM, which it does."""
    process = run("exit_hooks.expect(stop); tell('ready'); signal.pause()")
    assert hears(process, "ready")
    process.terminate()
    assert rest(process) == (-signal.SIGTERM, "begun\nsaid\n")


def test_signal_meanwhile(run: Run) -> None:
    """A signal does not break off what is under way already."""
    process = run("exit_hooks.expect(stop); stop(); signal.pause()", seconds=0.3)
    assert hears(process, "begun")
    process.terminate()
    assert rest(process) == (-signal.SIGTERM, "said\n")


def test_signal_while_another_thread_stops(run: Run) -> None:
    """The same where another thread has begun it."""
    script = "import threading; exit_hooks.expect(stop); threading.Thread(target=stop).start(); signal.pause()"
    process = run(script, seconds=0.3)
    assert hears(process, "begun")
    process.terminate()
    assert rest(process) == (-signal.SIGTERM, "said\n")


def test_handler_taken_down(run: Run) -> None:
    """Nor where the server has taken its own handler down by then, as Gunicorn's workers do."""
    script = "signal.signal(signal.SIGTERM, lambda *_: None); exit_hooks.expect(stop)"
    process = run(script + "; signal.signal(signal.SIGTERM, signal.SIG_DFL); stop(); signal.pause()", seconds=0.3)
    assert hears(process, "begun")
    process.terminate()
    assert rest(process) == (-signal.SIGTERM, "said\n")


def test_second_signal(run: Run) -> None:
    """A second signal, as multiprocessing sends to those who do not die of the first at once, breaks nothing off."""
    process = run("exit_hooks.expect(stop); tell('ready'); signal.pause()", seconds=0.3)
    assert hears(process, "ready")
    process.terminate()
    assert hears(process, "begun")
    process.terminate()
    assert rest(process) == (-signal.SIGTERM, "said\n")


def test_failure(run: Run) -> None:
    """A farewell that fails keeps nobody alive."""
    process = run("exit_hooks.expect(lambda: 1 / 0); tell('ready'); signal.pause()")
    assert hears(process, "ready")
    process.terminate()
    assert rest(process)[0] == -signal.SIGTERM


def test_metric_in_use(run: Run, slot_directory: Path) -> None:
    """A signal that comes while the application is inside of a metric's lock does not wait for that."""
    os.environ.update(CONSUL_PROM_DIR=str(slot_directory), CONSUL_PROM_ADDRESS="127.0.0.1")
    script = """
from prometheus_client import Counter
import consul_prom
counter = Counter("hits", "Hits.", ["view"])
consul_prom.Worker(service="shop", consul_http_addr="127.0.0.1:1").start()
with counter._lock:
    signal.raise_signal(signal.SIGTERM)
"""
    assert rest(run(script))[0] == -signal.SIGTERM


def test_others_handler(run: Run) -> None:
    """A signal that the application handles, or ignores, is the application's."""
    script = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
exit_hooks.expect(stop)
tell(signal.getsignal(signal.SIGTERM).name)
stop()
tell(signal.getsignal(signal.SIGTERM).name)
"""
    assert rest(run(script)) == (0, "SIG_IGN\nbegun\nsaid\nSIG_IGN\n")


def test_not_in_the_main_thread(run: Run) -> None:
    """Where the signal cannot be handled, the end of Python is left."""
    script = (
        "import threading; other = threading.Thread(target=exit_hooks.expect, args=[stop]); other.start(); other.join()"
    )
    assert rest(run(script)) == (0, "begun\nsaid\n")


def test_forked_child(run: Run) -> None:
    """A forked child has nothing to say, and dies of the signal at once."""
    script = """
exit_hooks.expect(stop)
child = os.fork()
if not child:
    tell(signal.getsignal(signal.SIGTERM).name)
    sys.exit()
os.waitpid(child, 0)
tell("parent")
"""
    assert rest(run(script)) == (0, "SIG_DFL\nparent\nbegun\nsaid\n")


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_child_of_multiprocessing(run: Run, tmp_path: Path, method: str) -> None:
    """A process of multiprocessing's says it at its end, however it was made."""
    file = tmp_path / "child.py"
    file.write_text(BEGIN + "def work():\n    exit_hooks.expect(stop)\n")
    script = f"""
import multiprocessing
sys.path.insert(0, {str(tmp_path)!r})
import child
process = multiprocessing.get_context({method!r}).Process(target=child.work)
process.start()
process.join()
tell(process.exitcode)
"""
    assert rest(run(script)) == (0, "begun\nsaid\n0\n")


@pytest.mark.parametrize("terminated", [True, False], ids=["terminated", "ended"])
def test_worker(agent: DevAgent, workers: Workers, slot_directory: Path, *, terminated: bool) -> None:
    """A worker that nobody stops leaves no entry."""
    script = """
import time, consul_prom
worker = consul_prom.Worker()
worker.start()
while not worker.registered:
    time.sleep(0.01)
"""
    if terminated:
        process = workers.start()
        process.terminate()
        assert process.wait(60) == -signal.SIGTERM
    else:
        workers.run(script)
    assert not agent.state.services
    assert slots.abandoned(slot_directory, "shop") == []


def test_worker_whose_agent_hangs(agent: DevAgent, workers: Workers) -> None:
    """SIGTERM ends a worker within STOP_TIMEOUT, whatever Consul does."""
    process = workers.start(CONSUL_PROM_STOP_TIMEOUT="0.5")
    agent.fault = Fault(hang=True)
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM
