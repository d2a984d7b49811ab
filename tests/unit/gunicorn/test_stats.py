"""What Gunicorn's masters tally, and the page that is made of it."""

import json
import logging
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from consul_prom.gunicorn.stats import LogLines, MasterStats
from consul_prom.process.identity import process_identity
from consul_prom.worker.master_page import MasterPage
from tests.unit.forking import in_child


def samples(directory: Path) -> dict[str, float]:
    """The page's samples that are not 0."""
    page = generate_latest(MasterPage(directory, "shop").registry()).decode()
    pairs = (line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs if float(value)}


def record(message: str, *arguments: Any, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("gunicorn.error", level, "", 0, message, arguments, None)


def ended(tally: MasterStats, pid: int, signal: str) -> None:
    """What Gunicorn logs before it tells `child_exit`."""
    assert tally.filter(record("Worker (pid:%s) was sent %s! Perhaps out of memory?", pid, signal, level=40))


def test_page(slot_directory: Path) -> None:
    """The page has the workers, the exits by reason and the lines by level."""
    tally = MasterStats(slot_directory, "shop")
    tally.workers(wanted=4, alive=3)
    ended(tally, 11, "SIGKILL")
    tally.exited(11, timeout=False, left=True)
    ended(tally, 12, "SIGABRT")
    tally.exited(12, timeout=True, left=False)
    tally.filter(record("Worker (pid:%s) exited with code %s.", 13, 255, level=40))
    tally.exited(13, timeout=False, left=True)
    tally.exited(14, timeout=False, left=True)
    tally.exited(15, timeout=False, left=False)
    tally.filter(record("Worker (pid:%s) exited with code %s.", 16, 3, level=40))
    exits = 'gunicorn_worker_exits_total{master="0",'
    assert samples(slot_directory) == {
        'gunicorn_workers_wanted{master="0"}': 4,
        'gunicorn_workers{master="0"}': 3,
        exits + 'reason="signal",signal="SIGKILL"}': 1,
        exits + 'reason="timeout",signal="SIGABRT"}': 1,
        exits + 'reason="error",signal=""}': 1,
        exits + 'reason="max_requests",signal=""}': 1,
        exits + 'reason="stop",signal=""}': 1,
        exits + 'reason="boot",signal=""}': 1,
        'gunicorn_log_lines_total{level="error",master="0"}': 4,
    }


@pytest.mark.parametrize(
    ("wanted", "alive", "slots", "complete"), [(4, 4, 4, True), (4, 5, 6, True), (4, 3, 4, False), (4, 4, 3, False)]
)
def test_complete(slot_directory: Path, *, wanted: int, alive: int, slots: int, complete: bool) -> None:
    """All workers are there when the master has as many as it wants, and as many have slots."""
    assert not MasterPage(slot_directory, "shop").complete(slots)
    tally = MasterStats(slot_directory, "shop")
    tally.workers(wanted=wanted, alive=alive)
    assert MasterPage(slot_directory, "shop").complete(slots) == complete


def test_told_twice(slot_directory: Path) -> None:
    """A worker that Gunicorn's second SIGTERM hits on its way out was stopped, as it was told."""
    tally = MasterStats(slot_directory, "shop")
    ended(tally, 11, "SIGTERM")
    tally.exited(11, timeout=False, left=False)
    assert samples(slot_directory)['gunicorn_worker_exits_total{master="0",reason="stop",signal=""}'] == 1


def test_begins_at_zero(slot_directory: Path) -> None:
    """What has not happened yet is 0, so that the first time is an increase."""
    MasterStats(slot_directory, "shop")
    page = generate_latest(MasterPage(slot_directory, "shop").registry()).decode()
    for line in ('reason="boot",signal=""} 0.0', 'signal="SIGKILL"} 0.0', 'level="critical",master="0"} 0.0'):
        assert line in page


@pytest.mark.parametrize("message", ["", "Worker (pid:%s) was sent", "%s", 7, "Worker (pid:%s) exited with code %s."])
def test_odd_records(slot_directory: Path, message: Any) -> None:
    """Any other record is a line and nothing else, whatever its level and arguments."""
    tally = MasterStats(slot_directory, "shop")
    for level in (-1, 0, 35, 1000):
        assert tally.filter(record(message, "a", level=level))
        assert tally.filter(record(message, {"pid": 1}, level=level))
    assert sum(value for name, value in samples(slot_directory).items() if "lines" in name) == 8
    assert not any("exits" in name for name in samples(slot_directory))


def test_forked_worker(slot_directory: Path) -> None:
    """A worker inherits the filter, and what it logs is not the master's."""
    tally = MasterStats(slot_directory, "shop")
    in_child(lambda: tally.filter(record("a worker's")))
    assert not samples(slot_directory)


@pytest.mark.parametrize(
    "act",
    [
        lambda tally: tally.workers(wanted=0, alive=0),
        lambda tally: tally.exited(11, timeout=False, left=False),
        lambda tally: tally.close(),
    ],
    ids=["workers", "exited", "close"],
)
def test_forked_child(slot_directory: Path, act: Callable[[MasterStats], None]) -> None:
    """A forked child neither writes nor removes the file, which is the master's."""
    tally = MasterStats(slot_directory, "shop")
    tally.workers(wanted=2, alive=2)
    before = samples(slot_directory)
    in_child(lambda: act(tally))
    assert samples(slot_directory) == before


def test_two_masters(slot_directory: Path) -> None:
    """Two live masters have a number each, and one that is closed leaves its number to the next."""
    first, second = MasterStats(slot_directory, "shop"), MasterStats(slot_directory, "shop")
    MasterStats(slot_directory, "other")
    first.workers(wanted=1, alive=1)
    second.workers(wanted=2, alive=2)
    assert samples(slot_directory)['gunicorn_workers{master="1"}'] == 2
    first.close()
    assert set(MasterPage(slot_directory, "shop").living()) == {"1"}
    MasterStats(slot_directory, "shop")
    assert set(MasterPage(slot_directory, "shop").living()) == {"0", "1"}


def test_dead_master(slot_directory: Path) -> None:
    """What a dead master wrote is not on the page, and the next has its number."""
    process = subprocess.Popen(["sleep", "60"])
    identity = process_identity(process.pid)
    written: dict[str, Any] = {"pid": process.pid, "proc": identity, "wanted": 3, "alive": 3, "exits": [], "lines": {}}
    (slot_directory / "shop.master.0").write_text(json.dumps(written))
    masters = MasterPage(slot_directory, "shop")
    assert masters.living()
    process.kill()
    process.wait()
    assert not masters.living()
    MasterStats(slot_directory, "shop")
    assert set(masters.living()) == {"0"}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1, "proc": null}', '{"pid": "x", "proc": "a.b.c"}'])
def test_odd_files(slot_directory: Path, text: str) -> None:
    """What no master wrote is none."""
    for name in ("shop.master.0", "shop.master.x", "shop.master.0.new"):
        (slot_directory / name).write_text(text)
    assert not MasterPage(slot_directory, "shop").living()


def test_full_disk(slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is no error, and the page is what it was; nothing stays behind."""
    tally = MasterStats(slot_directory, "shop")
    tally.workers(wanted=1, alive=1)
    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", _no_space)
        tally.workers(wanted=2, alive=2)
    assert samples(slot_directory)['gunicorn_workers{master="0"}'] == 1
    assert not list(slot_directory.glob("*.new"))
    tally.workers(wanted=2, alive=2)
    assert samples(slot_directory)['gunicorn_workers{master="0"}'] == 2


def _no_space(*_arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_left_over_file(slot_directory: Path, tmp_path: Path) -> None:
    """What a killed master was writing, or somebody's link, is in nobody's way, and is not written through."""
    target = tmp_path / "target"
    (slot_directory / "shop.master.0.new").symlink_to(target)
    MasterStats(slot_directory, "shop").workers(wanted=1, alive=1)
    assert samples(slot_directory)
    assert not target.exists()


def test_writing(slot_directory: Path) -> None:
    """All that is done to files is done in the context that is given."""
    inside = []

    @contextmanager
    def writing() -> Iterator[None]:
        inside.append(True)
        yield
        inside.append(False)

    MasterStats(slot_directory, "shop", writing=writing).workers(wanted=1, alive=1)
    assert inside.count(True) == inside.count(False) == 3


def test_log_lines_of_a_worker(registry: CollectorRegistry) -> None:
    """A worker counts its own lines in its registry, where the application has no metric of that name."""
    lines = LogLines(registry)
    assert lines.filter(record("one", level=logging.ERROR))
    assert registry.get_sample_value("gunicorn_log_lines_total", {"level": "error"}) == 1
    other = CollectorRegistry()
    Counter("gunicorn_log_lines", "The application's.", registry=other)
    with pytest.raises(ValueError, match="Duplicated"):
        LogLines(other)


def test_counted_by_masters(slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What masters have counted themselves is on their page, told apart by master; what is 0 is not."""
    registry = CollectorRegistry()
    monkeypatch.setattr("consul_prom.gunicorn.stats.REGISTRY", registry)
    hits = Counter("hits", "Hits.", ["route"], registry=registry)
    Counter("unused", "-", registry=registry)
    Gauge("size", "-", registry=registry).set(3)
    first = MasterStats(slot_directory, "shop")
    hits.labels("/").inc(5)
    first.workers(wanted=0, alive=0)
    hits.labels("/").inc(2)
    MasterStats(slot_directory, "shop").workers(wanted=0, alive=0)
    assert {key: value for key, value in samples(slot_directory).items() if "_created" not in key} == {
        'hits_total{master="0",route="/"}': 5,
        'hits_total{master="1",route="/"}': 7,
    }
