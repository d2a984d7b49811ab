"""What runs in Gunicorn's master harms nobody, whatever is wrong."""

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from consul_prom.devagent import DevAgent, running
from consul_prom.gunicorn.master import Master
from consul_prom.gunicorn.stats import LOG, MasterStats
from consul_prom.slots import slots
from consul_prom.worker.master_page import MasterPage
from tests.unit.gunicorn.test_reaper import leave_slot


@pytest.fixture
def agent(slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DevAgent]:
    with running() as agent:
        monkeypatch.setenv("CONSUL_PROM_DIR", str(slot_directory))
        monkeypatch.setenv("CONSUL_PROM_SERVICE", "shop")
        monkeypatch.setenv("CONSUL_PROM_HOST", "web-1")
        monkeypatch.setenv("CONSUL_HTTP_ADDR", agent.url)
        yield agent
    for one in list(logging.getLogger(LOG).filters):
        logging.getLogger(LOG).removeFilter(one)


def make() -> Master:
    return Master(uid=os.geteuid(), gid=os.getegid())


def test_life(agent: DevAgent, slot_directory: Path) -> None:
    """It tallies from its start to its stop, and buries between."""
    master = make()
    masters = MasterPage(slot_directory, "shop")
    master.workers(wanted=2, alive=2)
    assert masters.living()["0"]["wanted"] == 2
    logging.getLogger(LOG).error("a line")
    assert masters.living()["0"]["lines"]["error"] == 1
    master.bury(leave_slot(slot_directory, agent), timeout=False, left=False)
    assert not agent.state.services
    leave_slot(slot_directory, agent)
    master.stop(dying=lambda: False)
    assert not agent.state.services
    assert not masters.living()
    assert not logging.getLogger(LOG).filters


def test_no_service(
    agent: DevAgent, slot_directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a service it has no page, says so, and buries all the same."""
    monkeypatch.delenv("CONSUL_PROM_SERVICE")
    master = make()
    assert "CONSUL_PROM_SERVICE is not set" in caplog.text
    master.workers(wanted=1, alive=1)
    master.bury(leave_slot(slot_directory, agent), timeout=True, left=False)
    assert not agent.state.services
    master.stop(dying=lambda: False)


@pytest.mark.parametrize(
    ("name", "value"), [("CONSUL_PROM_PORT", "many"), ("CONSUL_PROM_DIR", "/dev/null/slots"), ("CONSUL_PROM_DIR", "x")]
)
def test_misset(
    agent: DevAgent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str
) -> None:
    """What is wrong in the environment is one line that names it, and the master goes on."""
    monkeypatch.setenv(name, value)
    master = make()
    assert len(caplog.records) == 1
    assert name in caplog.text
    master.workers(wanted=1, alive=1)
    master.bury(1, timeout=False, left=False)
    master.stop(dying=lambda: False)
    assert len(caplog.records) == 1


def test_directory_fails_at_the_start(agent: DevAgent, slot_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that cannot be used at the start is tried again at each event; the dead are seen to meanwhile."""
    caplog.set_level(logging.INFO)
    slot_directory.rmdir()
    slot_directory.touch()
    master = make()
    master.workers(wanted=2, alive=1)
    slot_directory.unlink()
    slot_directory.mkdir(mode=0o700)
    master.workers(wanted=2, alive=2)
    assert MasterPage(slot_directory, "shop").living()["0"]["wanted"] == 2
    logging.getLogger(LOG).error("a line")
    assert MasterPage(slot_directory, "shop").living()["0"]["lines"]["error"] == 1
    assert [record.levelname for record in caplog.records if record.name != LOG] == ["WARNING", "WARNING"]
    master.stop(dying=lambda: False)
    assert not logging.getLogger(LOG).filters


def test_disabled(agent: DevAgent, slot_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off, it does nothing."""
    monkeypatch.setenv("CONSUL_PROM_DISABLED", "true")
    master = make()
    master.workers(wanted=1, alive=1)
    master.bury(leave_slot(slot_directory, agent), timeout=False, left=False)
    master.stop(dying=lambda: False)
    assert agent.state.services
    assert not MasterPage(slot_directory, "shop").living()


def test_failure_that_lasts(agent: DevAgent, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure that Gunicorn's master meets each second is one line, and one when it is over."""
    caplog.set_level(logging.INFO)
    master = make()
    with monkeypatch.context() as patches:
        patches.setattr(MasterStats, "workers", Mock(side_effect=OSError("no space left")))
        for _ in range(5):
            master.workers(wanted=1, alive=1)
    master.workers(wanted=1, alive=1)
    master.workers(wanted=1, alive=1)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "no space left" in caplog.text


def test_surprise(agent: DevAgent, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody expected is logged, and raised to nobody."""
    master = make()
    monkeypatch.setattr(slots, "remains", lambda _directory: 1 / 0)
    master.bury(1, timeout=False, left=False)
    master.stop(dying=lambda: False)
    assert "did not expect this in Gunicorn's master" in caplog.text


def test_user_of_the_workers(agent: DevAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root master makes files as its workers' user, and is root again afterwards; any other has their user anyway."""
    user, group = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    directory = tmp_path / "theirs"
    for folder in (tmp_path, *tmp_path.parents):
        if stat.S_IMODE(folder.stat().st_mode) == 0o700:  # the tests' own, however many there are
            folder.chmod(0o755)
    directory.mkdir(mode=0o700)
    os.chown(directory, user, group)
    monkeypatch.setenv("CONSUL_PROM_DIR", str(directory))
    before = os.geteuid(), os.getegid()
    master = Master(uid=user, gid=group)
    master.workers(wanted=1, alive=1)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in directory.iterdir()} == {(user, group)}
    master.stop(dying=lambda: False)
    assert (os.geteuid(), os.getegid()) == before
