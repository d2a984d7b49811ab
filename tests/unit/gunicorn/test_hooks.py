"""Gunicorn's hooks, and how they live beside the user's own; what they do is shown on the real Gunicorn in e2e."""

import importlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from gunicorn.config import Config

import consul_prom
from consul_prom import gunicorn as hooks
from consul_prom.devagent import DevAgent
from consul_prom.gunicorn.master import Master
from consul_prom.worker.master_page import MasterPage
from tests.unit.forking import in_child
from tests.unit.gunicorn.test_reaper import leave_slot

NAMES = {ours.__name__ for ours in hooks._OURS}


def test_every_hook_is_one_of_gunicorns() -> None:
    """Gunicorn takes each hook, by its name and its number of parameters."""
    config = Config()
    for name in NAMES:
        config.set(name, vars(hooks)[name])


def test_nothing_else_is_a_setting() -> None:
    """The module of the hooks sets nothing in Gunicorn but hooks."""
    assert set(Config().settings) & set(vars(hooks)) == NAMES


def test_lazy() -> None:
    """The hooks are found in the package, as README has them."""
    assert consul_prom.gunicorn is hooks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("__config__", None)


def test_configuration_beside(folder: Path) -> None:
    """The configuration file of the folder is read, each time anew, and its hooks are kept."""
    (folder / "gunicorn.conf.py").write_text(
        "workers = 3\ncalls = []\ndef on_starting(server):\n    calls.append(server)\ndef on_reload(server): ...\n"
    )
    names = vars(hooks)
    assert names["workers"] == 3
    assert names["on_reload"].__name__ == "on_reload"
    Config().set("on_starting", names["on_starting"])
    (folder / "gunicorn.conf.py").write_text("workers = 4\n")
    assert vars(hooks)["workers"] == 4
    (folder / "gunicorn.conf.py").unlink()
    assert "workers" not in vars(hooks)


def test_broken_configuration(folder: Path) -> None:
    """What is wrong in the user's file is the user's to see."""
    (folder / "gunicorn.conf.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        vars(hooks)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_order(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Both hooks run: the user's first where it may set the environment, otherwise ours."""
    calls: list[str] = []
    ours = getattr(hooks, name)
    spy: Any = lambda *_arguments: calls.append("ours")  # noqa: E731
    spy.__name__ = name
    monkeypatch.setattr(hooks, "_OURS", (spy,))
    monkeypatch.setattr(hooks, "_LAST", {spy} if ours in hooks._LAST else set())
    namespace: dict[str, Any] = {name: lambda *_arguments: calls.append("theirs")}
    hooks.install(namespace)
    namespace[name]("server", "worker")
    assert calls == (["theirs", "ours"] if name == "post_worker_init" else ["ours", "theirs"])


def test_ours_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's hook is called although a second signal, at which Gunicorn raises, has broken ours off."""
    calls: list[str] = []

    def worker_exit(*_arguments: object) -> None:
        raise SystemExit

    monkeypatch.setattr(hooks, "_OURS", (worker_exit,))
    namespace: dict[str, Any] = {"worker_exit": lambda *_arguments: calls.append("theirs")}
    hooks.install(namespace)
    with pytest.raises(SystemExit):
        namespace["worker_exit"]("server", "worker")
    assert calls == ["theirs"]


def test_install_twice() -> None:
    """Installed twice, as by a file that installs them and is read beside them, the hooks run once."""
    namespace: dict[str, Any] = {"child_exit": lambda _server, _worker: None}
    hooks.install(namespace)
    once = dict(namespace)
    hooks.install(namespace)
    assert namespace == once
    assert namespace["on_exit"] is hooks.on_exit


def test_frozen_before_the_fork() -> None:
    """A worker's garbage collections, also the one at its end, skip what the master has imported."""
    script = "import gc; from consul_prom import gunicorn as hooks; hooks._preload(); print(len(gc.get_objects()))"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(process.stdout) < 1000


LIFE = """
import os, sys
from unittest.mock import Mock
from gunicorn.config import Config
from consul_prom import gunicorn as hooks
config = Config()
for ours in hooks._OURS:
    config.set(ours.__name__, ours)
server, worker = Mock(WORKERS={}, num_workers=1, cfg=config), Mock(pid=os.getpid(), cfg=config)
hooks._preload()
before = set(sys.modules)
hooks.on_starting(server)
hooks.pre_fork(server, worker)
hooks.post_worker_init(worker)
ours = hooks._Ours.workers[worker]
while not ours.registered:
    pass
print(ours.url, flush=True)
hooks.child_exit(server, Mock(pid=int(sys.stdin.readline()), aborted=False))
hooks.worker_exit(server, worker)
hooks.child_exit(server, worker)
hooks.on_exit(server)
print(*sorted(set(sys.modules) - before))
"""


def test_imported_before_the_fork(agent: DevAgent, slot_directory: Path) -> None:
    """Nothing is imported later: the user of the workers may not be allowed to read the directory of the modules."""
    environment = {
        **os.environ,
        "CONSUL_PROM_DIR": str(slot_directory),
        "CONSUL_PROM_SERVICE": "shop",
        "CONSUL_PROM_HOST": "web-1",
        "CONSUL_HTTP_ADDR": agent.url.replace("127.0.0.1", "localhost"),
    }
    with subprocess.Popen(
        [sys.executable, "-c", LIFE], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        url = process.stdout.readline().strip()
        for accept in ("text/plain", "application/openmetrics-text;version=1.0.0"):
            request = urllib.request.Request(url, headers={"Accept": accept, "Accept-Encoding": "gzip"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert answer.read()
        process.stdin.write(f"{leave_slot(slot_directory, agent)}\n")
        process.stdin.close()
        assert process.stdout.read().split() == []
    assert process.returncode == 0
    assert not agent.state.services


@pytest.mark.parametrize(
    ("replaced", "told"),
    [
        ((), ""),
        (("worker_exit",), "worker_exit was replaced by it"),
        (("on_starting", "child_exit"), "on_starting, child_exit were replaced by it"),
    ],
)
def test_replaced(caplog: pytest.LogCaptureFixture, replaced: tuple[str, ...], told: str) -> None:
    """A hook that a later line of the file puts in the place of ours is told, since nothing else would tell."""
    names: dict[str, Any] = {}
    hooks.install(names)
    config = Config()
    for name, hook in (names | dict.fromkeys(replaced, lambda *_arguments: None)).items():
        config.settings[name].value = hook
    hooks._look_for_others(config)
    assert [record.getMessage().partition("gunicorn.conf.py: ")[2] for record in caplog.records] == [told] * bool(told)


@pytest.mark.parametrize("name", ["pre_fork", "nworkers_changed", "worker_exit", "child_exit", "on_exit"])
def test_forked_by_a_worker(slot_directory: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A hook that runs in a child which a worker has forked leaves the master's statistics alone."""
    monkeypatch.setenv("CONSUL_PROM_DIR", str(slot_directory))
    monkeypatch.setenv("CONSUL_PROM_SERVICE", "shop")
    server, worker = Mock(num_workers=2, WORKERS={}), Mock(pid=os.getppid(), aborted=False)
    server.cfg.max_requests = 0
    master = hooks._Ours.masters[server] = Master(uid=os.geteuid(), gid=os.getegid())
    try:
        master.workers(wanted=2, alive=2)
        before = MasterPage(slot_directory, "shop").living()
        arguments = {"nworkers_changed": (server, 0, 2), "on_exit": (server,)}.get(name, (server, worker))
        in_child(lambda: vars(hooks)[name](*arguments))
        assert MasterPage(slot_directory, "shop").living() == before
    finally:
        hooks.on_exit(server)
    assert not MasterPage(slot_directory, "shop").living(), "the master itself still acts"


def test_hook_by_name() -> None:
    """A hook that is named rather than given, as Gunicorn allows, is called too."""
    namespace: dict[str, Any] = {"on_exit": f"{__name__}.their_on_exit"}
    hooks.install(namespace)
    Config().set("on_exit", namespace["on_exit"])
    namespace["on_exit"](_Server())
    assert importlib.import_module(__name__).SEEN


SEEN: list[object] = []


class _Server:
    """An Arbiter that has had none of our hooks."""


def their_on_exit(server: object) -> None:
    importlib.import_module(__name__).SEEN.append(server)
