"""A worker that is registered, and that nobody scrapes."""

import asyncio
import logging
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from consul_prom.devagent import running
from consul_prom.worker import scrape_watchdog as module
from consul_prom.worker.scrape_watchdog import ScrapeWatchdog
from tests.services.waiting import eventually, wait_until
from tests.services.workers import PACKAGE


class Scene:
    """A worker's vigil, on a clock of ours."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.registered = True
        self.scrape: float | None = None
        self.vigil = ScrapeWatchdog(
            who=lambda: "web-1:0",
            registered=lambda: self.registered,
            last_scrape=lambda: self.scrape,
            cause=lambda: "a cause",
            clock=lambda: self.now,
        )

    def wait(self, seconds: float, *, scraped_each: float = 0) -> None:
        """Look each five seconds, as the real one does."""
        ends_at = self.now + seconds
        while self.now < ends_at:
            self.now += 1
            if scraped_each and self.now % scraped_each == 0:
                self.scrape = self.now
            if self.now % 5 == 0:
                self.vigil.look()


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def levels(said: pytest.LogCaptureFixture) -> list[str]:
    return [record.levelname for record in said.records]


def test_never_scraped(scene: Scene, said: pytest.LogCaptureFixture) -> None:
    """After five minutes without any scrape there is one WARNING, with the cause, and no second one."""
    scene.wait(300)
    assert levels(said) == []
    scene.wait(10)
    scene.wait(7200)
    assert levels(said) == ["WARNING"]
    assert said.messages[0] == "web-1:0 is registered, and nobody has scraped it for 305 s: a cause"


def test_scrapes_end(scene: Scene, said: pytest.LogCaptureFixture) -> None:
    """After three intervals without a scrape there is one WARNING; when they begin again, one INFO."""
    scene.wait(120, scraped_each=15)
    scene.wait(30)
    assert levels(said) == []
    scene.wait(30)
    assert levels(said) == ["WARNING"]
    scene.wait(600)
    scene.wait(120, scraped_each=15)
    assert levels(said) == ["WARNING", "WARNING"]
    scene.wait(70)
    assert levels(said) == ["WARNING", "WARNING", "WARNING"]


@pytest.mark.parametrize("interval", [1, 15, 60, 240])
def test_scraped(scene: Scene, said: pytest.LogCaptureFixture, interval: int) -> None:
    """While it is scraped, however often, nothing is said."""
    scene.wait(20 * interval, scraped_each=interval)
    assert levels(said) == []


def test_interval_changes(scene: Scene, said: pytest.LogCaptureFixture) -> None:
    """A Prometheus that was told to come less often is taken for one that has ended once, and not again."""
    scene.wait(120, scraped_each=15)
    scene.wait(3600, scraped_each=240)
    assert levels(said) == ["WARNING", "WARNING"]


def test_not_registered(scene: Scene, said: pytest.LogCaptureFixture) -> None:
    """What is not registered is another's to say; the time begins when it is."""
    scene.registered = False
    scene.wait(1000)
    scene.registered = True
    scene.wait(295)
    assert levels(said) == []
    scene.wait(15)
    assert levels(said) == ["WARNING"]


async def test_runs(scene: Scene, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture) -> None:
    """It looks by itself, again and again."""
    monkeypatch.setattr(module, "ROUND", 0.01)
    scene.vigil.look()
    scene.now += 301
    watching = asyncio.ensure_future(scene.vigil.run())
    await eventually(lambda: levels(said) == ["WARNING"], within=10, what="a warning")
    watching.cancel()


WORKER = """
import logging, signal, sys, time
import consul_prom
from consul_prom.worker import scrape_watchdog

logging.basicConfig(format="%(levelname)s %(message)s")
scrape_watchdog.ROUND, scrape_watchdog.UNKNOWN, scrape_watchdog.LEAST = 0.05, 0.3, 0.3
with consul_prom.running(service="shop", host="web-1", linger=0) as worker:
    while worker.url is None:
        time.sleep(0.01)
    print(worker.url, flush=True)
    signal.sigwait([signal.SIGTERM])
"""


def run(tmp_path: Path, agent: str, **settings: str) -> Any:
    environ = {"PYTHONPATH": str(PACKAGE), "CONSUL_HTTP_ADDR": agent, "CONSUL_PROM_DIR": str(tmp_path / "slots")}
    return subprocess.Popen(
        [sys.executable, "-c", f"import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n{WORKER}"],
        env={**os.environ, **environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_real_worker(tmp_path: Path) -> None:
    """A real worker says what it is, that nobody scrapes it, and what to look at."""
    with running() as agent, run(tmp_path, agent.url, CONSUL_PROM_ADDRESS="127.0.0.1") as worker:
        url = worker.stdout.readline().strip()
        line = worker.stderr.readline()
        worker.terminate()
        rest = worker.communicate(timeout=20)[1]
    assert line.startswith("WARNING web-1:0 is registered, and nobody has scraped it for ")
    assert "Prometheus does not look for shop-metrics (consul-prom config prometheus)" in line
    assert f"or does not reach {url} (CONSUL_PROM_ADDRESS)" in line
    assert "nobody has scraped" not in rest


def test_real_cause(tmp_path: Path) -> None:
    """Where somebody came without the password, that is the cause, and not that nobody came."""
    (tmp_path / "web.yml").write_text(f"basic_auth_users: {{me: $2b$04${'a' * 53}}}\n")
    settings = {"CONSUL_PROM_ADDRESS": "127.0.0.1", "CONSUL_PROM_WEB_CONFIG": str(tmp_path / "web.yml")}
    with running() as agent, run(tmp_path, agent.url, **settings) as worker:
        url = worker.stdout.readline().strip()

        def refused() -> bool:
            try:
                urllib.request.urlopen(url, timeout=5)
            except OSError as error:
                return "401" in str(error)
            return False

        wait_until(refused, within=20, what="a scrape without a password")
        line = worker.stderr.readline()
        worker.terminate()
        worker.communicate(timeout=20)
    assert "127.0.0.1 came without a password that CONSUL_PROM_WEB_CONFIG has" in line
