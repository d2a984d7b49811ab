"""A prometheus_client of a version to come: it may keep what it has under any other name."""

import re
import shutil
from pathlib import Path

import prometheus_client
import pytest

from consul_prom.devagent import DevAgent
from tests.services.workers import PACKAGE, Workers

NAMES = [
    "MutexValue",
    "_collector_to_names",
    "_metrics",
    "_labelnames",
    "_value",
    "_created",
    "_lock",
    "_type",
    "_target_info",
]
MULTIPROCESS = """
import sys
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
Counter("hits", "-").inc()
import consul_prom, consul_prom.gunicorn
from consul_prom.ledger.compat import check_library
from consul_prom.errors import LedgerError
from consul_prom.exposition.metric_types import known

worker = consul_prom.Worker(request_metrics=False)
worker.start()
worker.stop()
try:
    check_library()
except LedgerError as error:
    print(error)
assert not known()
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
SCRIPT = """
import logging, logging.handlers, os, queue, sys, time, urllib.request
from prometheus_client import Counter, Histogram

said, odd = queue.SimpleQueue(), []
logging.getLogger().addHandler(logging.handlers.QueueHandler(said))
sys.unraisablehook = odd.append
hits, seconds = Counter("hits", "-", ["route"]), Histogram("seconds", "-")
hits.labels("/").inc()
import consul_prom

worker = consul_prom.Worker()
worker.start()
while not worker.registered:
    time.sleep(0.01)
hits.labels("/").inc()
seconds.observe(1)
page = urllib.request.urlopen(worker.url).read().decode()
assert 'hits_total{route="/"} 2.0' in page and "seconds_count 1.0" in page, page
child = os.fork()
if not child:
    hits.labels("/").inc()
    os._exit(len(odd))
assert os.waitpid(child, 0)[1] == 0
worker.stop()
while not said.empty():
    record = said.get()
    if record.levelno > logging.INFO:
        print(record.getMessage())
assert not odd, odd
"""


@pytest.mark.parametrize("name", [*NAMES, "ValueClass"])
def test_unknown(agent: DevAgent, workers: Workers, tmp_path: Path, name: str) -> None:
    """Counters live in memory where the ledger needs the name, one WARNING says so; the page has them all the same."""
    other = tmp_path / "prometheus_client"
    shutil.copytree(Path(prometheus_client.__file__).parent, other, ignore=shutil.ignore_patterns("__pycache__"))
    for file in other.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(name, f"{name}_of_another_name"), encoding="utf-8")
    said = workers.run(SCRIPT, PYTHONPATH=f"{tmp_path}:{PACKAGE}", CONSUL_PROM_ADDRESS="127.0.0.1").splitlines()
    warning = r"the counters of web-1:0 live in memory: prometheus_client is of a version unknown to us.*LEDGER\)"
    assert len(said) == (name in NAMES)
    assert all(re.fullmatch(warning, line) for line in said)
    assert not agent.state.services


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_multiprocess_mode(workers: Workers, tmp_path: Path, disabled: str) -> None:
    """In multiprocess mode, where values are files of the application's, our checks of the library write nothing."""
    said = workers.run(MULTIPROCESS, PROMETHEUS_MULTIPROC_DIR=str(tmp_path), CONSUL_PROM_DISABLED=disabled)
    assert [line for line in said.splitlines() if line and not line.startswith("#")] == [
        "prometheus_client is in multiprocess mode (PROMETHEUS_MULTIPROC_DIR)",
        "hits_total 1.0",
    ]
