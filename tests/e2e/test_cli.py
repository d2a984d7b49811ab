"""The command line: what it shows, what it removes, and its exit codes."""

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from prometheus_client import CollectorRegistry, Counter, Histogram

from consul_prom import __version__
from consul_prom.cli import main as cli_main
from consul_prom.devagent import DevAgent, Fault
from consul_prom.generate.settings_table import settings_table
from consul_prom.ledger.file import Ledger
from consul_prom.ledger.registry import LedgerRegistry
from consul_prom.process.identity import process_identity
from consul_prom.settings.settings import ROWS
from tests.services.consul import Consul
from tests.services.waiting import wait_until
from tests.services.workers import PACKAGE, Workers, meta, put

Run = Callable[..., Result]


@pytest.fixture
def run(agent: DevAgent) -> Run:
    """Runs a command as on the host ``web-1``; keyword arguments are environment variables."""

    def run(*arguments: str, **environ: str | None) -> Result:
        env = {"CONSUL_HTTP_ADDR": agent.url, "CONSUL_PROM_HOST": "web-1", **environ}
        result = CliRunner().invoke(cli_main.commands, arguments, env=env)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return run


def known(agent: DevAgent) -> set[str]:
    return set(agent.state.services)


def sentence(result: Result) -> str:
    """What the command said on standard error: one line."""
    (line,) = result.stderr.splitlines()
    return line.removeprefix("Error: ")


def command(*arguments: str, **environ: str) -> tuple[list[str], dict[str, str]]:
    """A command line of its own process, and its environment."""
    return [sys.executable, "-m", "consul_prom", *arguments], {**os.environ, "PYTHONPATH": str(PACKAGE), **environ}


def in_terminal(*arguments: str, **environ: str) -> tuple[int, str]:
    """Exit code and output of a command that has a terminal of 100 columns."""
    line, env = command(*arguments, **{"TERM": "xterm-256color", "COLUMNS": "100", **environ})
    ours, theirs = pty.openpty()
    process = subprocess.Popen(line, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    chunks = []
    try:
        while select.select([ours], [], [], 60)[0]:
            try:
                chunks.append(os.read(ours, 65536))
            except OSError:  # the other end was closed
                break
        return process.wait(10), b"".join(chunks).decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


# ------------------------------------------------------------------------------------------------ what all have


def test_version() -> None:
    """The version is told, also by `python -m consul_prom`."""
    line, env = command("--version")
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"consul-prom {__version__}\n"


def every_command(group: click.Group = cli_main.commands, name: str = "") -> Iterator[tuple[str, click.Command]]:
    for key, found in group.commands.items():
        if isinstance(found, click.Group):
            yield from every_command(found, f"{name} {key}")
        else:
            yield f"{name} {key}".strip(), found


def test_commands() -> None:
    """There are these commands, and each says what it is for."""
    commands = dict(every_command())
    assert set(commands) == {
        "agent",
        "completion",
        "config acl",
        "config grafana",
        "config prometheus",
        "config rules",
        "config settings",
        "demo",
        "deregister",
        "doctor",
        "list",
        "top",
    }
    assert all(found.help for found in commands.values())


def test_help_fits_a_screen() -> None:
    """Help is no longer than a screen, and no wider; what one does is shown by an example."""
    for name in ("", *dict(every_command())):
        text = CliRunner().invoke(cli_main.commands, (*name.split(), "--help"), terminal_width=80).stdout
        assert len(text.splitlines()) <= 32, name
        assert max(map(len, text.splitlines())) <= 80, name
        assert "..." not in text.partition("\n")[2], name
    for name in ("", "list", "deregister", "doctor", "top", "config prometheus", "completion"):
        assert "Example" in CliRunner().invoke(cli_main.commands, (*name.split(), "--help")).stdout


def test_reader_that_goes_away(agent: DevAgent) -> None:
    """What shows a table for ever shows it to a pipe too, time after time, and ends when nobody reads it any more."""
    line, env = command("top", "--service", "shop", "--interval", "0.2", CONSUL_HTTP_ADDR=agent.url)
    process = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shown, errors = process.stdout, process.stderr
    assert shown
    assert errors
    with errors:
        try:
            with shown:
                for _ in range(2):
                    assert shown.readline() == f"The agent at {agent.url} shows us no worker of the service shop.\n"
            assert process.wait(30) == 128 + signal.SIGPIPE
            assert errors.read() == ""
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    "arguments", [("list",), ("list", "--json"), ("config", "settings"), ("doctor", "--service=x")]
)
def test_nobody_reads(agent: DevAgent, arguments: tuple[str, ...]) -> None:
    """A pipe that nobody reads is no finding: the exit code is the one of a program that SIGPIPE ended."""
    line, env = command(*arguments, CONSUL_HTTP_ADDR=agent.url)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer) as pipe:  # noqa: PTH123  # a descriptor
        done = subprocess.run(line, env=env, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_interrupted_while_it_starts() -> None:
    """Ctrl-C while libraries are imported shows no stack trace."""
    program = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "rich":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
import consul_prom.__main__
consul_prom.__main__.main()
"""
    _, env = command()
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "Aborted!\n")


def test_full_disk() -> None:
    """What cannot be written is one sentence."""
    line, env = command("config", "rules", "--service", "shop")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_completion(shell: str) -> None:
    """Each shell gets a script that calls us."""
    text = CliRunner().invoke(cli_main.commands, ("completion", shell)).stdout
    assert "_CONSUL_PROM_COMPLETE" in text


def test_no_color(agent: DevAgent) -> None:
    """NO_COLOR is heeded in a terminal, where there is colour otherwise."""
    arguments = ("doctor", "--service=shop", f"--consul-http-addr={agent.url}")
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert coloured.search(in_terminal(*arguments)[1])
    assert not coloured.search(in_terminal(*arguments, NO_COLOR="1")[1])


def test_secrets_have_no_option() -> None:
    """No command takes a secret on its command line, where everybody could see it."""
    secrets = {row.name for row in ROWS if row.secret}
    assert secrets == {"consul_http_token", "consul_http_auth"}
    for _, found in every_command():
        assert not secrets & {parameter.name for parameter in found.params}


@pytest.mark.parametrize("name", ["list", "deregister", "config prometheus"])
def test_connection_options(name: str) -> None:
    """Whatever is about the agent and no secret is an option, with the setting's own help."""
    options = {it.name: it for it in dict(every_command())[name].params if isinstance(it, click.Option)}
    rows = [row for row in ROWS if not row.env.startswith("CONSUL_PROM_") and not row.secret]
    for row in rows:
        assert (options[row.name].help or "").startswith(row.help)
        assert row.env in (options[row.name].help or "")
    assert len(rows) > 8


def test_option_beats_environment(run: Run, agent: DevAgent) -> None:
    """An option beats the environment variable."""
    put(agent, "tea.web-1.0", meta(service="tea"))
    result = run("list", "--consul-http-addr", agent.url, "--service=tea", "--json", CONSUL_HTTP_ADDR="127.0.0.1:1")
    assert [it["id"] for it in json.loads(result.stdout)] == ["tea.web-1.0"]
    assert run("list", "--json", "--service=tea", CONSUL_PROM_SERVICE="shop").stdout == result.stdout
    assert json.loads(run("list", "--json", CONSUL_PROM_SERVICE="shop").stdout) == []


@pytest.mark.parametrize("arguments", [("list",), ("deregister",), ("deregister", "--id=x"), ("deregister", "--all")])
def test_no_agent(run: Run, arguments: tuple[str, ...]) -> None:
    """An agent that is not there is one sentence and exit code 3."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    result = run(*arguments, CONSUL_HTTP_ADDR=address)
    assert result.exit_code == 3
    assert address in sentence(result)
    assert result.stdout == ""


def test_no_agent_but_a_server(run: Run, agent: DevAgent) -> None:
    """A server that is no Consul agent is exit code 3 too."""
    agent.fault = Fault(status=200, body="<html>")
    result = run("list")
    assert result.exit_code == 3
    assert "no JSON" in sentence(result)


def test_agent_refuses(run: Run, agent: DevAgent) -> None:
    """An agent that answers and refuses is exit code 1."""
    agent.fault = Fault(status=403, body="ACL not found")
    result = run("deregister")
    assert result.exit_code == 1
    assert "ACL not found" in sentence(result)


@pytest.mark.parametrize("address", ["ftp://x", "unix://relative", "http://", "h:99999", "http://:8500", "a b"])
def test_wrong_address(run: Run, address: str) -> None:
    """A CONSUL_HTTP_ADDR of a wrong shape is one sentence and exit code 2, whichever way it came."""
    result = run("list", CONSUL_HTTP_ADDR=address)
    assert result.exit_code == 2
    assert sentence(result).startswith(f"CONSUL_HTTP_ADDR={address!r} ")
    result = run("list", f"--consul-http-addr={address}")
    assert result.exit_code == 2
    assert sentence(result).startswith(f"--consul-http-addr={address!r} ")


@pytest.mark.parametrize(
    "environ",
    [
        {"CONSUL_HTTP_TOKEN": "hunter2\n"},
        {"CONSUL_HTTP_AUTH": "user:hunter2\u20ac"},
        {"CONSUL_HTTP_ADDR": "http://user:hunter2@127.0.0.1"},
        {"CONSUL_HTTP_TOKEN": "hunter2", "CONSUL_HTTP_ADDR": "ftp://x"},
        {"CONSUL_HTTP_TOKEN": "hunter2", "CONSUL_HTTP_ADDR": "127.0.0.1:1"},
    ],
)
def test_no_secret_is_shown(run: Run, environ: dict[str, str]) -> None:
    """A message names the setting, and never shows a secret's value."""
    result = run("list", **environ)
    assert result.exit_code in {2, 3}
    assert "hunter2" not in result.output
    assert list(environ)[-1] in sentence(result)


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("list", "--nonsense"), ("deregister", "--all", "--id=x"), ("config",)]
)
def test_usage(run: Run, arguments: tuple[str, ...]) -> None:
    """What is no command or no option is exit code 2."""
    assert run(*arguments).exit_code == 2


# ------------------------------------------------------------------------------------------------ list


def test_list(run: Run, agent: DevAgent, workers: Workers) -> None:
    """Each worker is a line: where it is, how its check stands, and whether it lives."""
    first, second = workers.start(), workers.start()
    workers.hold(first)  # or its caretaker would remove the other's entry
    workers.kill(second)
    agent.state.update_check("service:shop.web-1.1", "critical", "")
    put(agent, "shop.web-2.0", meta(host="web-2", instance="web-2:0", pid="7"))
    put(agent, "foreign", {})
    result = run("list")
    assert result.exit_code == 0
    ports = [agent.state.services[f"shop.web-1.{slot}"].port for slot in (0, 1)]
    lines = [re.split(r"  +", line) for line in result.stdout.splitlines()]
    assert lines == [
        ["instance", "service", "pid", "address", "status", "worker", "proof"],
        ["web-1:0", "shop", str(first.pid), f"127.0.0.1:{ports[0]}", "passing", "alive", lines[1][6]],
        [
            "web-1:1",
            "shop",
            str(second.pid),
            f"127.0.0.1:{ports[1]}",
            "critical",
            "dead",
            "the lock of its slot is free",
        ],
        ["web-2:0", "shop", "7", "127.0.0.1:1", "passing", "unknown", "it is of the host web-2, and this is web-1"],
    ]


def test_list_ledger(run: Run, slot_directory: Path) -> None:
    """What the ledgers hold is a line a metric: how many series, how many of them unused, and their total."""
    path = slot_directory / "shop.3.ledger"
    for now in (1_000_000.0, 1_000_001.0):
        registry = CollectorRegistry()
        hits = Counter("hits", "-", ["x"], registry=registry)
        seconds = Histogram("seconds", "-", registry=registry)
        book = LedgerRegistry(registry, Ledger.take_over(path, boot="b", instance="web-1:3", now=now))
        hits.labels(str(now)).inc(2)
        seconds.observe(7)
        book.close()
    (slot_directory / "shop.4.ledger").write_text("nonsense")
    result = run("list", "--ledger", f"--dir={slot_directory}")
    assert result.exit_code == 0
    assert [re.split(r"  +", line.strip())[:8] for line in result.stdout.splitlines()] == [
        ["service", "slot", "instance", "metric", "type", "series", "unused", "total"],
        ["shop", "3", "web-1:3", "hits", "counter", "2", "1", "4.0"],
        ["shop", "3", "web-1:3", "seconds", "histogram", "1", "0", "2.0"],
    ]
    facts = json.loads(run("list", "--ledger", "--json", f"--dir={slot_directory}", "--service=shop").stdout)
    assert [(fact["metric"], fact["total"], fact["slot"]) for fact in facts] == [("hits", 4.0, 3), ("seconds", 2.0, 3)]
    assert run("list", "--ledger", "--json", f"--dir={slot_directory}", "--service=other").stdout == "[]\n"
    assert "has no ledger of this user's" in run("list", "--ledger", f"--dir={slot_directory}/no").stdout


def test_list_json(run: Run, agent: DevAgent) -> None:
    """JSON has the same, with numbers as numbers."""
    put(agent, "shop.web-1.0", meta())
    put(agent, "odd", meta(pid="?", slot="x"))
    odd, shop = json.loads(run("list", "--json").stdout)
    assert (odd["pid"], odd["slot"], odd["state"]) == (None, None, "unknown")
    assert shop == {
        "id": "shop.web-1.0",
        "instance": "web-1:0",
        "service": "shop",
        "host": "web-1",
        "slot": 0,
        "pid": 1,
        "address": "127.0.0.1",
        "port": 1,
        "adopted": False,
        "state": "unknown",
        "proof": shop["proof"],
        "status": "passing",
    }


def test_list_of_nothing(run: Run) -> None:
    """Where there is nothing, that is said; JSON is an empty list."""
    assert "shows us no worker of consul-prom" in run("list").stdout
    assert "no worker of the service shop" in run("list", "--service=shop").stdout
    assert run("list", "--json").stdout == "[]\n"


def test_terminal(agent: DevAgent) -> None:
    """A terminal gets a coloured table, with NO_COLOR one without colours."""
    put(agent, "shop.web-1.0", meta())
    code, text = in_terminal("list", CONSUL_HTTP_ADDR=agent.url)
    assert code == 0
    assert "\u2500\u2500\u2500" in text
    assert "\x1b[33munknown" in text
    code, text = in_terminal("list", CONSUL_HTTP_ADDR=agent.url, NO_COLOR="1")
    assert code == 0
    assert "unknown" in text
    assert not re.search(r"\x1b\[(\d+;)*3\d", text)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_hostile_entry(agent: DevAgent, encoding: str) -> None:
    """Escape sequences that somebody registered reach no terminal, and signs that it lacks are no error."""
    put(agent, "shop.web-1.0", meta(instance="web\x1b]0;owned\x07\n\u00e9\u2028"))
    for how in ({}, {"TERM": "dumb"}):
        code, text = in_terminal("list", CONSUL_HTTP_ADDR=agent.url, PYTHONIOENCODING=encoding, PYTHONUTF8="0", **how)
        assert code == 0
        assert "\x1b]" not in text
        assert "\x07" not in text
        assert "\u2028" not in text
        assert r"web\x1b]0;" in text


# ------------------------------------------------------------------------------------------------ deregister


def test_deregister(run: Run, agent: DevAgent, workers: Workers) -> None:
    """Without an option, who is dead goes and who lives stays; a second time there is nothing to do."""
    first, second = workers.start(), workers.start()
    workers.hold(first)  # or its caretaker would be at it too
    workers.kill(second)
    result = run("deregister")
    assert result.exit_code == 0
    assert re.search(
        rf"^shop\.web-1\.1 +{second.pid} +removed +the lock of its slot is free$", result.stdout, re.MULTILINE
    )
    assert "shop.web-1.0" not in result.stdout
    assert result.stdout.splitlines()[-1] == "1 removed; 1 alive."
    assert known(agent) == {"shop.web-1.0"}
    result = run("deregister")
    assert (result.exit_code, result.stdout) == (0, "1 alive.\n")


def test_deregister_nothing(run: Run, agent: DevAgent) -> None:
    """Where there is nothing, that is said and right."""
    put(agent, "foreign", {})
    result = run("deregister")
    assert result.exit_code == 0
    assert "shows us no worker" in result.stdout


def test_dry_run(run: Run, agent: DevAgent, workers: Workers) -> None:
    """A dry run says what would go, which is a finding, and removes nothing."""
    workers.start()
    assert run("deregister", "--dry-run").exit_code == 0
    workers.kill(workers.start())
    result = run("deregister", "--dry-run")
    assert result.exit_code == 1
    assert "would remove" in result.stdout
    assert result.stdout.splitlines()[-1] == "1 to remove; 1 alive."
    assert known(agent) == {"shop.web-1.0", "shop.web-1.1"}


def test_unproven(run: Run, agent: DevAgent) -> None:
    """What cannot be proven dead stays, is left undone, and the way to remove it works."""
    put(agent, "shop.web-1.0", meta(proc="another-boot.1.1"))
    result = run("deregister")
    assert result.exit_code == 1
    assert "1 not proven dead." in result.stdout
    assert known(agent) == {"shop.web-1.0"}
    advice = re.search(r"consul-prom (deregister --id .*)", result.stdout)
    assert advice
    result = run(*advice[1].split())
    assert result.exit_code == 0
    assert known(agent) == set()


def test_other_services_and_hosts(run: Run, agent: DevAgent) -> None:
    """Only this host's entries are looked at, and only the service's that was asked for."""
    put(agent, "shop.web-1.0", meta())
    put(agent, "shop.web-2.0", meta(host="web-2"))
    put(agent, "tea.web-1.0", meta(service="tea"))
    result = run("deregister", "--all", "--service=tea")
    assert (result.exit_code, known(agent)) == (0, {"shop.web-1.0", "shop.web-2.0"})
    result = run("deregister", "--all")
    assert (result.exit_code, known(agent)) == (0, {"shop.web-2.0"})
    assert "1 of other hosts not looked at (web-2: --host)" in result.stdout
    result = run("deregister")
    assert (result.exit_code, result.stdout) == (0, "1 of other hosts not looked at (web-2: --host).\n")
    result = run("deregister", "--all", "--host=web-2")
    assert (result.exit_code, known(agent)) == (0, set())


def test_all_takes_the_living(run: Run, agent: DevAgent, workers: Workers) -> None:
    """--all removes the living too, and says that they will be back, which they are."""
    process = workers.start()
    result = run("deregister", "--all")
    assert result.exit_code == 0
    assert "registers again" in result.stdout
    wait_until(lambda: workers.entries(process.pid), within=30, what="registered again")


def test_id(run: Run, agent: DevAgent) -> None:
    """--id removes what it names and nothing else, whatever the host; what is not there is no failure."""
    for slot in ("0", "1"):
        put(agent, f"shop.web-2.{slot}", meta(host="web-2", slot=slot))
    result = run("deregister", "--id=shop.web-2.1", "--id=nothing")
    assert result.exit_code == 0
    assert known(agent) == {"shop.web-2.0"}
    assert re.search(r"^shop\.web-2\.1 +1 +removed ", result.stdout, re.MULTILINE)
    assert re.search(r"^nothing +gone +it is not registered$", result.stdout, re.MULTILINE)
    assert run("deregister", "--dry-run", "--id=shop.web-2.0").exit_code == 1
    assert known(agent) == {"shop.web-2.0"}


FOREIGN = {
    "no-meta": {},
    "half-a-marker": {"managed_by": "consul-prom"},
    "the-other-half": {"external-source": "consul-prom"},
    "shop.web-1.7": {**meta(slot="7"), "managed_by": "another"},
    "shop.web-1.8": {**meta(slot="8"), "external-source": "another"},
}


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--all",),
        ("--all", "--service=shop"),
        ("--host=web-1", "--all"),
        tuple(f"--id={entry}" for entry in FOREIGN),
    ],
)
def test_foreign_entries_stay(run: Run, agent: DevAgent, arguments: tuple[str, ...]) -> None:
    """An entry without our whole marker is never touched, however it is asked."""
    for entry_id, foreign_meta in FOREIGN.items():
        put(agent, entry_id, foreign_meta)
    result = run("deregister", *arguments)
    assert known(agent) == set(FOREIGN)
    assert [method for method, path in agent.requests if "deregister" in path] == []
    if "--id=no-meta" not in arguments:
        assert (result.exit_code, "shows us no worker" in result.stdout) == (0, True)
    else:
        assert result.exit_code == 1
        assert result.stdout.count("it is not consul-prom's") == len(FOREIGN)


def test_deregister_json(run: Run, agent: DevAgent, workers: Workers) -> None:
    """JSON tells of every entry, the living too."""
    workers.start()
    workers.kill(workers.start())
    result = run("deregister", "--json")
    assert result.exit_code == 0
    told = [(it["id"], it["state"], it["action"], it["trouble"]) for it in json.loads(result.stdout)]
    assert told == [("shop.web-1.0", "alive", "kept", ""), ("shop.web-1.1", "dead", "removed", "")]
    assert run("deregister", "--json", "--service=other").stdout == "[]\n"


def test_denied(run: Run, agent: DevAgent, workers: Workers) -> None:
    """What the token may not remove is left undone; the right that is missing is named, no token is."""
    workers.kill(workers.start())
    agent.fault = Fault(method="PUT", status=403, body="Permission denied")
    result = run("deregister", CONSUL_HTTP_TOKEN="hunter2")
    assert result.exit_code == 1
    assert "the token needs the rule" in result.stdout
    assert "1 failed." in result.stdout
    assert "hunter2" not in result.output


def test_agent_goes_away(run: Run, agent: DevAgent) -> None:
    """What was done before the agent went away is told, and then that it did."""
    for slot in ("0", "1"):
        put(agent, f"shop.web-1.{slot}", meta(slot=slot))
    agent.fault = Fault(path="/v1/agent/service/deregister/shop.web-1.1", reset=True)
    result = run("deregister", "--all", "--json")
    assert result.exit_code == 3
    assert [(it["id"], it["action"]) for it in json.loads(result.stdout)] == [("shop.web-1.0", "removed")]
    assert agent.url in sentence(result)


def test_service_write_is_enough(slot_directory: Path) -> None:
    """On a real Consul with ACLs, a token with nothing but service:write lists and removes."""
    token, manager = "11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555"
    acl = {"enabled": True, "default_policy": "deny", "tokens": {"initial_management": manager, "agent": manager}}
    with Consul(config={"acl": acl}) as consul:
        policy = {"Name": "shop", "Rules": 'service "shop-metrics" { policy = "write" }'}
        assert consul.call("/v1/acl/policy", method="PUT", body=policy)[0] == 200
        body = {"SecretID": token, "Policies": [{"Name": "shop"}]}
        wait_until(lambda: consul.call("/v1/acl/token", method="PUT", body=body)[0] == 200, within=20, what="a token")
        entry = {"ID": "shop.web-1.0", "Name": "shop-metrics", "Port": 1, "Meta": meta(**_of_a_dead_process())}
        assert consul.call("/v1/agent/service/register", method="PUT", body=entry)[0] == 200
        env = {"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_HOST": "web-1"}
        blind = CliRunner().invoke(cli_main.commands, ["list"], env=env)
        assert (blind.exit_code, "shows us no worker" in blind.stdout) == (0, True)
        refused = CliRunner().invoke(cli_main.commands, ["deregister", "--id=shop.web-1.0"], env=env)
        assert (refused.exit_code, "lacks permission" in sentence(refused)) == (1, True)
        env["CONSUL_HTTP_TOKEN"] = token
        listed = CliRunner().invoke(cli_main.commands, ["list", "--json"], env=env)
        assert [it["state"] for it in json.loads(listed.stdout)] == ["dead"]
        done = CliRunner().invoke(cli_main.commands, ["deregister"], env=env)
        assert (done.exit_code, "is gone" in done.stdout) == (0, True)
        assert consul.call("/v1/agent/services") == (200, {})


def _of_a_dead_process() -> dict[str, str]:
    process = subprocess.Popen(["sleep", "60"])
    identity = process_identity(process.pid)
    process.kill()
    process.wait()
    assert identity
    return {"pid": str(process.pid), "proc": identity}


# ------------------------------------------------------------------------------------------------ config


def test_config_settings(run: Run) -> None:
    """A pipe gets README's table; a terminal gets one for people."""
    assert run("config", "settings").stdout == settings_table()
    code, text = in_terminal("config", "settings")
    assert code == 0
    assert "\u2500\u2500\u2500" in text
    assert "| `" not in text
    assert [row.env for row in ROWS if not re.search(rf"{row.env}\s", text)] == [], "names that are broken over lines"


def test_config_prometheus(run: Run, agent: DevAgent) -> None:
    """The scrape configuration follows options and environment, and asks no agent."""
    result = run("config", "prometheus", "--service=shop", "--consul-http-addr=consul:8500")
    assert result.exit_code == 0
    assert "services: [shop-metrics]" in result.stdout
    assert "server: consul:8500" in result.stdout
    assert (
        run("config", "prometheus", "--consul-http-addr=consul:8500", CONSUL_PROM_SERVICE="shop").stdout
        == result.stdout
    )
    assert "services: [tea]" in run("config", "prometheus", "--service=shop", "--consul-service=tea").stdout
    assert "tags: [consul-prom]" in run("config", "prometheus", "--all-services").stdout
    assert "datacenter: dc2" in run("config", "prometheus", "--service=shop", "--datacenter=dc2").stdout
    assert "workers-ca.pem" in run("config", "prometheus", "--service=shop", "--web-config=/w.yml").stdout
    assert not agent.requests


def test_config_rules_and_grafana(run: Run) -> None:
    """Rules are those of the service, and a dashboard can be had without one."""
    assert 'job="tea"' in run("config", "rules", CONSUL_PROM_SERVICE="tea").stdout
    assert json.loads(run("config", "grafana").stdout)["uid"] == "consul-prom"
    assert '"value": "tea"' in run("config", "grafana", "--service=tea").stdout
    assert run("config", "rules").exit_code == 2


def test_config_prometheus_without_service(run: Run) -> None:
    """Without a service there is nothing to configure, and all ways to name one are told."""
    result = run("config", "prometheus")
    assert result.exit_code == 2
    assert all(way in sentence(result) for way in ("--service", "CONSUL_PROM_SERVICE", "--all-services"))


# ------------------------------------------------------------------------------------------------ agent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_agent(number: signal.Signals) -> None:
    """The development agent says that it is one, answers, and ends at once when told."""
    line, env = command("agent", "--listen=127.0.0.1:0", PYTHONUNBUFFERED="1")
    with subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found
        assert "development only" in said
        with urllib.request.urlopen(f"{found[0]}/v1/agent/self", timeout=5) as answer:
            assert answer.status == 200
        process.send_signal(number)
        rest = process.communicate(timeout=10)
    assert (process.returncode, rest) == (0, ("", ""))


@pytest.mark.parametrize(
    ("listen", "code"),
    [
        ("127.0.0.1:{port}", 1),
        ("203.0.113.1:0", 1),
        ("no-such-host.invalid:0", 1),
        ("[2001:db8::1]:0", 1),
        ("unix:///x", 2),
        ("http://h:1", 2),
        ("h:x", 2),
        ("h:65536", 2),
    ],
)
def test_agent_cannot_listen(run: Run, listen: str, code: int) -> None:
    """An address that cannot be had is one sentence."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = run("agent", "--listen", listen.format(port=server.getsockname()[1]))
    assert result.exit_code == code
    assert "--listen" in result.stderr
    assert "Traceback" not in result.stderr
