"""Counts of a process that forks: they are its own, and no worker in a child counts them again."""

import pytest

from tests.services.workers import Workers

COUNTED = """
import os, sys, time, urllib.request
import consul_prom
import prometheus_client

def page():
    worker = consul_prom.Worker(registry=registry)
    worker.start()
    while not worker.registered:
        time.sleep(0.01)
    lines = urllib.request.urlopen(worker.url).read().decode().splitlines()
    worker.stop()
    found = dict(line.rsplit(" ", 1) for line in lines)
    return float(found["pre_total"]), float(found['pre_seconds_sum{x="a"}'])

def in_child(act):
    pid = os.fork()
    if not pid:
        try:
            print(*act())
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(pid, 0)

def use(times):
    for _ in range(times):
        pre.inc()
        seconds.labels("a").observe(1)

registry = prometheus_client.REGISTRY
pre = prometheus_client.Counter("pre", "-", registry=registry)
seconds = prometheus_client.Histogram("pre_seconds", "-", ["x"], registry=registry)
use(5)

def work():
    use(2)
    return page()
"""


def run(workers: Workers, script: str, **settings: str) -> list[list[float]]:
    """The numbers that *script* prints, line by line."""
    said = workers.run(script, CONSUL_PROM_ADDRESS="127.0.0.1", **settings)
    return [[float(number) for number in line.split()] for line in said.splitlines()]


def test_not_counted_again(workers: Workers) -> None:
    """Each child's worker adds what the child has counted, before its start too, and never what the parent has."""
    script = f"{COUNTED}\nfor _ in range(3):\n    in_child(work)\n"
    assert run(workers, script) == [[2, 2], [4, 4], [6, 6]]


def test_registry_of_the_applications_own(workers: Workers) -> None:
    """The same for a registry that the child names first, for counts after that."""
    script = COUNTED.replace(
        "registry = prometheus_client.REGISTRY", "registry = prometheus_client.CollectorRegistry()"
    )
    script += "\ndef named():\n    consul_prom.Worker(registry=registry)\n    return work()\n"
    script += "for _ in range(2):\n    in_child(named)\n"
    assert run(workers, script) == [[2, 2], [4, 4]]


def test_after_a_worker_of_the_parents(workers: Workers) -> None:
    """The same where the parent has had a worker of its own, which counted on, and a grandchild counts."""
    script = f"""{COUNTED}
def family():
    use(1)
    in_child(work)
    return page()

print(*page())
use(1)
in_child(family)
print(*page())
"""
    assert run(workers, script) == [[5, 5], [7, 7], [8, 8], [9, 9]]


def test_own_view(workers: Workers) -> None:
    """A child's registry shows what it would without us, and the library's classes are as they were."""
    script = f"""{COUNTED}
def look():
    methods = [vars(prometheus_client.values.MutexValue)[name] for name in ("inc", "set")]
    pre.inc()
    now = [vars(prometheus_client.values.MutexValue)[name] for name in ("inc", "set")]
    return registry.get_sample_value("pre_total"), now == before, methods == before

before = [vars(prometheus_client.values.MutexValue)[name] for name in ("inc", "set")]
in_child(look)
"""
    script = script.replace("print(*act())", "print(*map(float, act()))")
    assert run(workers, script) == [[6, 1, 0]], "it is the first count that notes what the parent has counted"


@pytest.mark.parametrize("amount", ["inf", "nan"])
def test_not_finite(workers: Workers, amount: str) -> None:
    """What is not finite is left to the parent, and the child begins at 0."""
    script = f"{COUNTED}\npre.inc(float({amount!r}))\nfor _ in range(2):\n    in_child(work)\n"
    assert [pre for pre, _ in run(workers, script)] == [0, 0]
