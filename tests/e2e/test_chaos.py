"""Whatever happens, and in whatever order: when it is over, the targets are the right ones, and nothing leaks."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from consul_prom.consul.registration import is_worker
from tests.e2e.chaos import TOKEN, WORKERS, Chaos, Clients, Ends
from tests.services.traces import told, written
from tests.services.waiting import wait_until


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("seed", "seconds"),
    [(1, 30), pytest.param(2, 180, marks=pytest.mark.full), pytest.param(3, 180, marks=pytest.mark.full)],
)
def test_chaos(seed: int, seconds: float) -> None:
    """After random faults the targets are right; no request failed, and nothing was left, because of us."""
    with Chaos(seed, enabled=True) as chaos:
        chaos.rage(seconds)
        print(
            f"seed {seed}: {len(chaos.done)} faults, {len(chaos.ends.at)} ends,"
            f" {chaos.clients.asked} requests, {chaos.clients.failures}"
        )
        assert not chaos.unexcused()

        def instances() -> list[str]:
            return sorted(entry["Meta"]["instance"] for entry in chaos.entries().values())

        try:
            wait_until(lambda: chaos.targets() == instances(), within=150, what="the entries as targets")
        except AssertionError as error:
            health = chaos.consul.call("/v1/health/service/shop-metrics")[1]
            catalogue = sorted(found["Service"]["Meta"]["instance"] for found in health)
            pytest.fail(f"{error}: {instances()}\ntargets {chaos.targets()}\ncatalogue {catalogue}\n{chaos.done}")
        # The caretaker serves them: a listener, Prometheus' connection and the agent's check.
        guests = sum(not is_worker(entry["Meta"]) for entry in chaos.entries().values())
        for pid in {chaos.shop.pid, *chaos.shop.workers()}:
            assert len(list(Path(f"/proc/{pid}/task").iterdir())) <= 3, (
                "a worker's threads: its own, ours, a name look-up"
            )
            links = _links(pid)
            sockets = [link for link in links if link.startswith("socket:")]
            assert len(sockets) < 14 + 3 * guests, (guests, sockets)
            assert len(links) < 27 + 4 * guests, (guests, links)
        names = {path.name for path in (chaos.shop.directory / "slots").iterdir()}
        # A reload's old and new workers, and slots that the caretaker has adopted and cannot give up soon enough.
        slots = range(4 * WORKERS)
        shared = {"id", "shop.master.lock", "shop.masters", "shop.master.0"}
        left = names - shared - {f"shop.{number}.{end}" for number in slots for end in ("lock", "ledger")}
        assert not left
        found = [*told(chaos.consul, chaos.shop)]
        workers = set(chaos.shop.workers())
        chaos.shop.stop(within=30)
        assert not chaos.entries()
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
        log = chaos.shop.log.read_text()
        assert "Traceback" not in log, log[-5000:]
        found += written(chaos.shop.directory, chaos.prometheus.directory)
        assert any(text == log for _, text in found)
        assert not [where for where, text in found if TOKEN in text]


def test_excuse() -> None:
    """A client's failure counts unless a connection broke and a worker ended about then."""
    chaos = Chaos(1, enabled=True)
    nothing: Any = None
    chaos.ends, chaos.clients = Ends(nothing, at=[100.0, 200.0]), Clients(nothing)
    reset, late = ConnectionResetError(), TimeoutError()
    chaos.clients.failures = [(when, reset) for when in (96.9, 97.1, 100.4, 100.6, 150.0, 199.9)] + [(100.0, late)]
    assert chaos.unexcused() == [(96.9, reset), (100.6, reset), (150.0, reset), (100.0, late)]


def _links(pid: int) -> list[str]:
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            found.append(str(path.readlink()))
    return found
