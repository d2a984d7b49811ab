"""What a worker's children have of it, however they are made: nothing."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from consul_prom.devagent import DevAgent
from consul_prom.slots import slots
from tests.services.waiting import wait_until
from tests.services.workers import Workers

SCRIPT = """
import json, multiprocessing, os, subprocess, sys, threading, time, urllib.request
import consul_prom

def look(path):
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass  # that of the listing
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    found = {"links": links, "tasks": len(names), "threads": [thread.name for thread in threading.enumerate()]}
    with open(path, "w") as file:
        json.dump(found, file)

if __name__ == "__main__":
    how, path = sys.argv[1:]
    if how == "look":
        look(path)
        sys.exit(0)
    worker = consul_prom.Worker()
    worker.start()
    while not worker.registered:
        time.sleep(0.01)
    urllib.request.urlopen(worker.url).read()
    async def sockets():  # in the thread that opens and closes them
        return {os.readlink(f"/proc/self/fd/{fd}") for fd in worker._life.thread.descriptors()}
    ours = worker._life.thread.spawn(sockets()).result(10)
    if how == "fork":
        if not os.fork():
            look(path)
            os._exit(0)
        os.wait()
    elif how == "subprocess":
        subprocess.run([sys.executable, __file__, "look", path], check=True, close_fds=False)
    else:
        child = multiprocessing.get_context(how.partition(" ")[2]).Process(target=look, args=(path,))
        child.start()
        child.join()
        assert child.exitcode == 0
    urllib.request.urlopen(worker.url).read()
    print(json.dumps({"registered": worker.registered, "slot": worker.slot, "sockets": sorted(ours)}))
    worker.stop()
"""


@pytest.mark.parametrize(
    "how", ["fork", "subprocess", "multiprocessing fork", "multiprocessing forkserver", "multiprocessing spawn"]
)
def test_has_nothing(agent: DevAgent, slot_directory: Path, tmp_path: Path, how: str) -> None:
    """A child has no thread, no lock, no socket of the worker's and no entry; the worker goes on, and ends cleanly."""
    script, report = tmp_path / "script.py", tmp_path / "report.json"
    script.write_text(SCRIPT)
    environment = Workers(agent, slot_directory)._environment({"CONSUL_PROM_ADDRESS": "127.0.0.1"})
    done = subprocess.run(
        [sys.executable, str(script), how, str(report)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    worker: dict[str, Any] = json.loads(done.stdout)
    child: dict[str, Any] = json.loads(report.read_text())
    assert (worker["registered"], worker["slot"]) == (True, 0)
    assert len([link for link in worker["sockets"] if link.startswith("socket:")]) >= 2
    assert not set(worker["sockets"]) & {link for link in child["links"] if link.startswith("socket:")}
    assert "anon_inode:[eventpoll]" not in child["links"]
    assert not any(os.fspath(slot_directory) in link for link in child["links"])
    assert "consul-prom" not in " ".join(child["threads"])
    assert child["tasks"] == 1
    assert not agent.state.services, "neither the worker's, which has ended, nor a child's"
    assert slots.abandoned(slot_directory, "shop") == []


POOL = """
import multiprocessing
import consul_prom
from prometheus_client import Counter

DONE = Counter("done", "Tasks.")

def work(number):
    with consul_prom.running(linger=60):
        DONE.inc()

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for number in range(2):
            pool.apply_async(work, (number,))
        pool.close()
        pool.join()
"""


def test_pool(agent: DevAgent, slot_directory: Path, tmp_path: Path) -> None:
    """A pool that ends by close and join waits until each task's counts were scraped, as README says."""
    script = tmp_path / "script.py"
    script.write_text(POOL)
    environment = Workers(agent, slot_directory)._environment({"CONSUL_PROM_ADDRESS": "127.0.0.1"})
    seen = dict[str, float]()

    def scrape() -> None:
        for entry in list(agent.state.services.values()):
            with suppress(OSError):  # it may just have ended
                page = urllib.request.urlopen(f"http://127.0.0.1:{entry.port}/metrics", timeout=5).read().decode()
                if found := re.search(r"^done_total (.+)$", page, re.MULTILINE):
                    seen[entry.service_id] = float(found[1])

    with subprocess.Popen([sys.executable, str(script)], env=environment) as process:

        def ended() -> bool:
            scrape()
            return process.poll() is not None

        wait_until(ended, within=100, what="the end of the pool")
    assert (process.returncode, sum(seen.values())) == (0, 2.0)
