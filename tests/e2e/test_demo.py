"""`consul-prom demo`, as users run it: in a pipe, in a terminal, ended early, and on a machine that is set up oddly."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from consul_prom.cli import demo
from consul_prom.cli import main as cli_main
from consul_prom.devagent import running
from consul_prom.errors import DemoError
from tests.services.prometheus import promtool_check_config
from tests.services.waiting import wait_until
from tests.services.workers import PACKAGE

COMMAND = (sys.executable, "-m", "consul_prom", "demo")


class Home:
    """A home and a place for temporary files of the demo's own, so that what it leaves behind is seen."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environ = {
            **os.environ,
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
            "PYTHONPATH": str(PACKAGE),
            "PYTHONUNBUFFERED": "1",
            "TERM": "xterm-256color",
            "COLUMNS": "100",
        }

    def processes(self) -> list[int]:
        """Those that have our home in their environment."""
        needle = f"HOME={self._folder}\0".encode()
        return [pid for pid in _pids() if needle in _environ(pid)]

    def assert_left_clean(self) -> None:
        """No file, and no process but such that are just ending."""
        assert list(self._folder.rglob("*")) == []
        wait_until(lambda: not self.processes(), within=5, what="no process left")


def _pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    folder = tmp_path / "home"
    folder.mkdir()
    return Home(folder)


def test_pipe(home: Home) -> None:
    """In a pipe the demo tells the whole story in plain lines, and leaves nothing behind."""
    done = subprocess.run(COMMAND, env=home.environ, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    home.assert_left_clean()
    story = done.stdout
    assert "\x1b" not in story
    assert "Requests sent to /fire: 30" in story
    naive = re.findall(r"^    reqs_total\S+ (\d+)$", story, re.MULTILINE)
    assert len(naive) == 3
    assert all(0 <= int(count) < 30 for count in naive)
    assert '\nsum(reqs_total{view="fire"}) = 30\n' in story
    before, after = (
        re.findall(r"^(\S+:\d) +(\d+) +(\d+) +(\d+)$", part, re.MULTILINE) for part in story.split("kill -9")
    )
    assert [row[0].rpartition(":")[2] for row in before] == ["0", "1", "2", "3"]
    assert [row[0] for row in after] == [row[0] for row in before]
    assert sum(int(row[3]) for row in before) == 30
    assert {int(count) for count in naive} <= {int(row[3]) for row in before}
    (changed,) = (slot for slot in range(4) if before[slot] != after[slot])
    assert f"kill -9 {before[changed][1]} " in story
    assert before[changed][1:3] != after[changed][1:3]
    assert after[changed][3] == before[changed][3]
    assert f"The {before[changed][3]} requests that it had counted live on in its slot's ledger" in " ".join(
        story.split()
    )
    assert "goes on from there: the sum is still 30." in " ".join(story.split())
    snippet = story[story.index("scrape_configs:") : story.index("\n\n    sum without")]
    promtool_check_config(snippet)
    (config,) = yaml.safe_load(snippet)["scrape_configs"]
    assert config["consul_sd_configs"][0]["services"] == ["shop-metrics"]


def in_terminal(home: Home, *, interrupt_at: str = "") -> tuple[int, str]:
    """Exit code and output; Ctrl-C is typed as soon as *interrupt_at* is shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(COMMAND[0], COMMAND, home.environ)  # noqa: S606  # this is a shell's own way
    shown, typed = b"", not interrupt_at
    try:
        while select.select([terminal], [], [], 60)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the other end was closed
                break
            if not typed and interrupt_at.encode() in shown:
                os.write(terminal, b"\x03")
                typed = True
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()
    finally:
        os.close(terminal)


def test_terminal(home: Home) -> None:
    """In a terminal there are a progress bar, tables and colours."""
    code, shown = in_terminal(home)
    assert code == 0
    home.assert_left_clean()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "30/30" in plain
    assert "\u2501\u2501\u2501" in plain
    assert "\u2500\u2500\u2500" in plain
    assert 'sum(reqs_total{view="fire"}) = 30' in plain
    assert shown != plain


@pytest.mark.parametrize(
    "moment", ["one line", "Starting gunicorn", "Requests sent", "naive", "kill -9", "has its slot"]
)
def test_interrupted(home: Home, moment: str) -> None:
    """Ctrl-C at any moment leaves nothing behind, and no stack trace."""
    code, shown = in_terminal(home, interrupt_at=moment)
    assert (code, "Aborted!" in shown) in {(1, True), (0, False)}
    assert "Traceback" not in shown
    home.assert_left_clean()


def test_interrupted_twice(home: Home) -> None:
    """A second signal does not keep the demo from cleaning up."""
    with subprocess.Popen(
        COMMAND, env=home.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert any(line.startswith("Starting") for line in process.stdout)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        assert process.returncode in {1, -signal.SIGINT}
    home.assert_left_clean()


def test_keep(home: Home) -> None:
    """With --keep all stays up, at the addresses that are shown, until a signal, which is the regular end of it."""
    command = (*COMMAND, "--keep")
    with subprocess.Popen(
        command, env=home.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            assert any("until Ctrl-C" in line for line in process.stdout)
            urls = [process.stdout.readline().split()[-1] for _ in range(7)]
            for url in urls:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    assert answer.status == 200
            assert len(set(urls)) == 7
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=30) == ("", "")
        finally:
            process.kill()
    assert process.returncode == 0
    home.assert_left_clean()


def test_odd_machine(home: Home) -> None:
    """What is set on the machine, right or wrong, does not reach the demo."""
    odd = {
        "CONSUL_HTTP_ADDR": "127.0.0.1:1",
        "CONSUL_HTTP_TOKEN_FILE": "/nowhere",
        "CONSUL_PROM_DISABLED": "true",
        "CONSUL_PROM_SERVICE": "other",
        "CONSUL_PROM_PORT": "wrong",
        "PROMETHEUS_MULTIPROC_DIR": "/nowhere",
        "GUNICORN_CMD_ARGS": "--workers=1",
        "http_proxy": "http://127.0.0.1:1",
    }
    environ = {**home.environ, **odd}
    done = subprocess.run(COMMAND, env=environ, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "= 30" in done.stdout
    assert "/nowhere" not in done.stdout


def run() -> Result:
    result = CliRunner().invoke(cli_main.commands, ["demo"])
    assert isinstance(result.exception, SystemExit), result.exc_info
    return result


def test_without_gunicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Gunicorn is missing, one sentence says how to get it."""
    monkeypatch.setattr(demo, "find_spec", lambda _name: None)
    result = run()
    assert result.exit_code == 1
    assert result.stderr == "Error: the demo needs Gunicorn: pip install gunicorn\n"


def test_sum_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that is not 30 is shown as it is, and the demo fails."""
    monkeypatch.setattr(demo, "APPLICATION", demo.APPLICATION.replace(".inc()", ".inc(2)"))
    result = run()
    assert result.exit_code == 1
    assert '\nsum(reqs_total{view="fire"}) = 60\n' in result.stdout
    assert "30 requests were sent, and 4 targets counted 60." in result.stderr


def test_take_over_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the workers that live on count otherwise after the kill, the demo fails."""
    kill, requests = demo._Gunicorn.kill, demo._requests
    killed = []

    def noted(server: demo._Gunicorn, pid: int) -> None:
        killed.append(pid)
        kill(server, pid)

    monkeypatch.setattr(demo._Gunicorn, "kill", noted)
    monkeypatch.setattr(demo, "_requests", lambda page: requests(page) + len(killed))
    result = run()
    assert result.exit_code == 1
    assert "That is not as it should be" in result.stderr


def test_application_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Gunicorn ends, the part of its log that says why is shown."""
    monkeypatch.setattr(demo, "APPLICATION", "raise SystemError('broken on purpose')")
    result = run()
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: Gunicorn ended.\nGunicorn's log:\n")
    assert "broken on purpose" in result.stderr


def test_workers_do_not_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that never register are waited for only so long."""
    monkeypatch.setattr(demo, "APPLICATION", demo.APPLICATION.replace("    consul_prom.setup", "    pass  # "))
    monkeypatch.setattr(demo, "START_DEADLINE", 2.0)
    result = run()
    assert result.exit_code == 1
    assert "It was not within 2 s that 4 workers registered." in result.stderr


def test_hanging_server_is_killed(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gunicorn that does not end when told is killed with its workers."""
    monkeypatch.setattr(demo, "STOP_DEADLINE", 0.2)
    monkeypatch.setenv("HOME", home.environ["HOME"])
    folder = tmp_path / "parts"
    folder.mkdir()
    with running() as agent, demo._Gunicorn(folder, agent) as server:
        wait_until(lambda: len(agent.state.services) == demo.WORKERS, within=30, what="workers")
        assert server._process
        assert len(home.processes()) == 1 + demo.WORKERS
        server._process.send_signal(signal.SIGSTOP)
    wait_until(lambda: not home.processes(), within=5, what="no process left")


def test_only_workers_are_killed(tmp_path: Path) -> None:
    """A pid that the agent names is killed only if it is one of Gunicorn's, whoever registered it."""
    refused = pytest.raises(DemoError, match="none of Gunicorn's")
    with subprocess.Popen(["sleep", "60"]) as bystander:
        with running() as agent, demo._Gunicorn(tmp_path, agent) as server, refused:
            server.kill(bystander.pid)
        assert bystander.poll() is None
        bystander.kill()


def test_signals_wait_for_their_moment() -> None:
    """No signal cuts anything off half-way: it is noted, and heeded where that is harmless."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with demo._Signals() as signals:
            signals.check()
            os.kill(os.getpid(), number)
            with pytest.raises(KeyboardInterrupt):
                signals.check()
    assert [signal.getsignal(number) for number in numbers] == before
