"""Completion in real shells: somebody types, and presses Tab."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from consul_prom.cli import main as cli_main
from tests.services.workers import PACKAGE

SHELLS = {
    "bash": ("bash --norc --noprofile", 'eval "$(consul-prom completion bash)"'),
    "zsh": ("zsh -f", 'fpath=("$PWD" $fpath); autoload -U compinit; compinit -u -D'),
}
DEADLINE = 60.0
LINES = (
    ("doc", "doctor"),
    ("config gr", "config grafana"),
    ("top --on", "top --once"),
    ("completion z", "completion zsh"),
    ("list --dir ./slo", "list --dir ./slots/"),
)


class Terminal:
    """An interactive shell, and what it has shown."""

    def __init__(self, ours: int) -> None:
        self._ours = ours
        self._shown = ""

    def type(self, keys: str, *, until: str) -> None:
        """Press *keys*, and wait until *until* is shown after it."""
        self._shown, ends_at = "", time.monotonic() + DEADLINE
        os.write(self._ours, keys.encode())
        while until not in self._plain() and select.select([self._ours], [], [], ends_at - time.monotonic())[0]:
            self._shown += os.read(self._ours, 65536).decode(errors="replace")
        assert until in self._plain(), self._shown

    def _plain(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|.\x08|\a", "", self._shown)


@contextmanager
def terminal(command: str, environ: dict[str, str]) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command.split(), env=environ, stdin=theirs, stdout=theirs, stderr=theirs, cwd=environ["HOME"]
    )
    os.close(theirs)
    try:
        yield Terminal(ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A home where `consul-prom` is a command, the shells' scripts lie where our help puts them, and `slots` is."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "slots").mkdir()
    program = tmp_path / "bin" / "consul-prom"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m consul_prom "$@"\n')
    program.chmod(0o755)
    for shell, name in (("fish", ".config/fish/completions/consul-prom.fish"), ("zsh", "_consul-prom")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(CliRunner().invoke(cli_main.commands, ("completion", shell)).stdout)
    path = f"{program.parent}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "200", "PYTHONPATH": str(PACKAGE)}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(("typed", "completed"), LINES)
def test_in_terminal(shell: str, typed: str, completed: str, environ: dict[str, str]) -> None:
    """Commands, options, their values and directories are completed at a Tab."""
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    command, set_up = SHELLS[shell]
    with terminal(command, environ) as screen:
        screen.type(f"{set_up}; PS1='rea''dy '\n", until="ready ")
        screen.type(f"consul-prom {typed}\t", until=f"consul-prom {completed}")


@pytest.mark.parametrize(("typed", "completed"), LINES)
def test_in_fish(typed: str, completed: str, environ: dict[str, str]) -> None:
    """The same in fish, as it tells itself."""
    if not shutil.which("fish"):
        pytest.skip("no fish here")
    found = in_fish(typed, environ)
    assert [line.split("\t")[0] for line in found] == [completed.rsplit(maxsplit=1)[-1]]


def test_words_with_commas(environ: dict[str, str]) -> None:
    """What fish tells of a command is not cut at a comma."""
    if not shutil.which("fish"):
        pytest.skip("no fish here")
    (line,) = in_fish("demo", environ)
    assert line.startswith("demo\tShow it at work: Gunicorn, four workers")


def in_fish(typed: str, environ: dict[str, str]) -> list[str]:
    command = ["fish", "-c", f"complete -C 'consul-prom {typed}'"]
    done = subprocess.run(
        command, env=environ, cwd=environ["HOME"], capture_output=True, text=True, check=True, timeout=DEADLINE
    )
    return done.stdout.splitlines()
