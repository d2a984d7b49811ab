"""The command line. Exit codes: 0 nothing wrong, 1 a finding or something left undone, 2 usage, 3 no agent."""

import asyncio
import functools
import json
import logging
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from click.shell_completion import get_completion_class

from consul_prom import __version__, caretaker, dashboard, ledger, rules, snippets
from consul_prom.caretaker import Entry, Outcome, Verdict
from consul_prom.client import AgentClient
from consul_prom.errors import AgentConfused, AgentTimeout, AgentUnreachable, ConsulPromError, SettingsError
from consul_prom.ledger import Contents, Family, Series
from consul_prom.registration import origin
from consul_prom.screen import Screen
from consul_prom.settings import ROWS, Row, Settings, check_named, load
from consul_prom.top import HEAD, Reading, line, ordered, total, watch

T = TypeVar("T")

FINDING: Final = 1


class _Failure(click.ClickException):
    exit_code = FINDING


class _Usage(click.ClickException):
    exit_code = 2


class _NoAgent(click.ClickException):
    exit_code = 3


class _Commands(click.Group):
    """Says what we expect to go wrong in one sentence."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise _Usage(str(error)) from error
        except (AgentUnreachable, AgentTimeout, AgentConfused) as error:
            raise _NoAgent(str(error)) from error
        except ConsulPromError as error:
            raise _Failure(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="consul-prom", message="%(prog)s %(version)s")
def commands() -> None:
    """Metrics of a multi-process Python server: every worker its own Prometheus target, found through Consul.

    Every command reads the same environment variables as the workers; options beat them. What `config settings` shows
    and a command heeds is an option too, shown or not, but for secrets.

    Exit codes: 0 nothing wrong, 1 a finding or something left undone, 2 usage, 3 the agent cannot be reached.

    \b
    Examples:
      consul-prom demo
      consul-prom config prometheus --service shop
      CONSUL_HTTP_ADDR=https://consul:8501 consul-prom doctor --service shop
    """


_SHOWN: Final = {"service", "consul_service", "host", "consul_http_addr", "consul_http_token_file"}


def _reads(*names: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a command the settings, and an option for each of *names* and for all that is about the agent."""
    rows = [row for row in ROWS if not row.secret and (row.name in names or not row.env.startswith("CONSUL_PROM_"))]

    def decorate(command: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(command)
        def with_settings(**given: Any) -> T:
            return command(_load({row.name: given.pop(row.name) for row in rows}), **given)

        for row in reversed(rows):
            _option(row)(with_settings)
        return with_settings

    return decorate


def _load(arguments: Mapping[str, str | None]) -> Settings:
    try:
        return load(arguments)
    except SettingsError as error:
        name, equals, rest = str(error).partition("=")
        if not error.from_code or name not in arguments:
            raise
        raise SettingsError(f"{_flag(name)}{equals}{rest}", from_code=True) from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _option(row: Row) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """All are taken, and few shown: a screen has room for those that one looks for."""
    help_ = f"{row.help} [{row.env}]"
    kind = click.Path(readable=False) if row.kind == "path" else str  # which a shell completes; we check it
    return click.option(_flag(row.name), row.name, type=kind, metavar="TEXT", help=help_, hidden=row.name not in _SHOWN)


@commands.command("list")
@click.option("--ledger", "saved", is_flag=True, help="List what the ledgers of --dir hold instead; asks no agent.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_reads("service", "host", "dir")
def list_(settings: Settings, *, saved: bool, as_json: bool) -> None:
    """List the workers that the agent knows, with their health and whether they live.

    The lock of its slot or its process tells whether a worker lives; both can be seen on its own host only. Of a slot
    that is adopted a sibling serves the last page.

    \b
    Example:
      consul-prom list --json | jq -r '.[] | select(.status=="critical").id'
    """
    if saved:
        _list_saved(settings, as_json=as_json)
        return
    found = _with_agent(settings, lambda agent: _look(agent, settings))
    facts = [{**_facts(entry, verdict), "status": status} for entry, verdict, status in found]
    if as_json:
        _print_json(facts)
    elif facts:
        columns = ("instance", "service", "pid", "address", "status", "worker", "proof")
        rows = [
            [fact["instance"], fact["service"], fact["pid"], _at(fact), fact["status"], _living(fact), fact["proof"]]
            for fact in facts
        ]
        Screen().table(columns, rows, numbers=("pid",))
    else:
        Screen().say(_nothing(settings))


def _list_saved(settings: Settings, *, as_json: bool) -> None:
    """A line for each metric of each ledger."""
    columns = ("service", "slot", "instance", "metric", "type", "series", "unused", "total")
    facts = [
        dict(zip(columns, row, strict=True))
        for path, contents in ledger.in_directory(settings.dir, settings.service)
        for row in _saved(path, contents)
    ]
    if as_json:
        _print_json(facts)
    elif facts:
        rows = [[str(fact[column]) for column in columns] for fact in facts]
        Screen().table(columns, rows, numbers=("slot", "series", "unused", "total"))
    else:
        Screen().say(f"CONSUL_PROM_DIR={str(settings.dir)!r} has no ledger of this user's; the workers' may have.")


def _saved(path: Path, contents: Contents) -> Iterator[tuple[Any, ...]]:
    service, slot, _ = path.name.rsplit(".", 2)
    by_family: dict[Family, list[Series]] = {}
    for one in contents.series:
        by_family.setdefault(one.family, []).append(one)
    for family, series in sorted(by_family.items(), key=lambda item: item[0].name):
        unused = sum(one.used != ledger.IN_USE for one in series)
        counted = sum(one.count for one in series)
        instance = contents.head.get("instance", "?")
        yield service, int(slot), instance, family.name, family.kind, len(series), unused, counted


async def _look(agent: AgentClient, settings: Settings) -> list[tuple[Entry, Verdict, str]]:
    found = []
    for entry in await caretaker.entries(agent, service=settings.service):
        checks = {check.get("Status") for check in await agent.checks(entry["ID"])}
        status = next((worst for worst in ("critical", "warning") if worst in checks), "passing")
        with caretaker.judged(entry, host=settings.host) as verdict:
            found.append((entry, verdict, status))
    return found


@commands.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed; exit code 1 if there is any.")
@click.option("--id", "ids", metavar="ID", multiple=True, help="Remove this entry, alive or not; may be repeated.")
@click.option("--all", "everything", is_flag=True, help="Remove all entries of this host (and service), alive or not.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_reads("service", "host")
def deregister(settings: Settings, *, dry_run: bool, ids: Sequence[str], everything: bool, as_json: bool) -> None:
    """Remove the entries of dead workers from the agent.

    Without --id and --all: those of this host whose worker is provably dead, since the lock of its slot is free or,
    where that cannot be told, its process is gone. An entry that consul-prom did not make is never touched.

    \b
    Examples:
      consul-prom deregister --dry-run
      consul-prom deregister --service shop --all      (as systemd's ExecStopPost)
    """
    if ids and everything:
        raise click.UsageError("--id and --all exclude each other")
    outcomes: list[Outcome] = []
    elsewhere: list[Entry] = []

    async def work(agent: AgentClient) -> None:
        if ids:
            found = [await _entry(agent, entry_id) for entry_id in dict.fromkeys(ids)]
        else:
            every = await caretaker.entries(agent, service=settings.service)
            found = [entry for entry in every if entry["Meta"].get("host") == settings.host]
            elsewhere.extend(entry for entry in every if entry not in found)
        sweep = caretaker.sweep(agent, found, host=settings.host, forced=everything or bool(ids), dry_run=dry_run)
        async with aclosing(sweep):
            async for outcome in sweep:
                outcomes.append(outcome)  # noqa: PERF401  # what was done is told, even where the next call fails

    try:
        _with_agent(settings, work)
    finally:
        if as_json:
            _print_json(_facts(it.entry, it.verdict) | {"action": it.action, "trouble": it.trouble} for it in outcomes)
        elif outcomes or elsewhere:
            _tell(outcomes, elsewhere)
    if not (as_json or outcomes or elsewhere):
        Screen().say(_nothing(settings))
    if any(map(_undone, outcomes)):
        raise click.exceptions.Exit(FINDING)


async def _entry(agent: AgentClient, entry_id: str) -> Entry:
    entry = await agent.service(entry_id)
    return entry.document if entry else {"ID": entry_id}


def _undone(outcome: Outcome) -> bool:
    unproven = outcome.action == "kept" and outcome.verdict.state == "unknown"
    return unproven or outcome.action in {"would remove", "refused", "failed"}


def _tell(outcomes: Sequence[Outcome], elsewhere: Sequence[Entry]) -> None:
    """Living workers are a number: who cleans up looks for what went, and for what did not."""
    screen = Screen()
    unproven = [it.entry["ID"] for it in outcomes if it.action == "kept" and it.verdict.state == "unknown"]
    rows = [
        (it.entry["ID"], _facts(it.entry, it.verdict)["pid"], it.action, _why(it))
        for it in outcomes
        if not _lives_on(it)
    ]
    if rows:
        screen.table(("entry", "pid", "action", "why"), rows, numbers=("pid",))
    counts = Counter("alive" if _lives_on(it) else _COUNTED.get(it.action, it.action) for it in outcomes)
    hosts = sorted({entry["Meta"].get("host", "") for entry in elsewhere})
    parts = [f"{number} {what}" for what, number in sorted(counts.items(), key=lambda count: count[0] == "alive")]
    parts += [f"{len(elsewhere)} of other hosts not looked at ({', '.join(hosts)}: --host)"] if elsewhere else []
    screen.say("; ".join(parts) + ".")
    if unproven:
        options = " ".join(f"--id {entry_id}" for entry_id in unproven)
        screen.say(
            f"What is kept could not be proven dead. To remove it all the same: consul-prom deregister {options}"
        )


_COUNTED: Final = {"would remove": "to remove", "kept": "not proven dead", "gone": "not there"}


def _lives_on(outcome: Outcome) -> bool:
    return outcome.action == "kept" and outcome.verdict.state == "alive"


def _why(outcome: Outcome) -> str:
    if outcome.trouble:
        return outcome.trouble
    again = outcome.action in {"removed", "would remove"} and outcome.verdict.state == "alive"
    return outcome.verdict.proof + ("; it registers again within seconds" if again else "")


@commands.command()
@click.option("--prometheus", default="", metavar="URL", help="A Prometheus that shall scrape the workers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_reads("service", "consul_service", "host", "address", "bind", "port", "dir", "ledger", "web_config")
def doctor(settings: Settings, *, prometheus: str, as_json: bool) -> None:
    """Look for what keeps the workers from being registered and scraped, and say what to do.

    Run it on the workers' host, as their user and with their settings. It only looks.

    \b
    Example:
      consul-prom doctor --service shop --prometheus http://prometheus:9090
    """
    from consul_prom.doctor import examine
    from consul_prom.finding import Finding

    findings: list[Finding] = []
    screen = Screen()

    async def work(agent: AgentClient) -> None:
        async with aclosing(examine(settings, agent, prometheus=prometheus)) as found:
            async for finding in found:
                findings.append(finding)
                if not as_json:
                    sign, style = _SIGNS[finding.state]
                    screen.say(f"{sign} {finding.check:10} {finding.sentence}", style=style)
                    if finding.cure and finding.state != "ok":
                        screen.say(f"  {'':10} {finding.cure}")

    _with_agent(settings, work)
    if as_json:
        _print_json(finding._asdict() for finding in findings)
    wrong = {finding.check for finding in findings if finding.state == "wrong"}
    if "agent" in wrong:
        raise click.exceptions.Exit(_NoAgent.exit_code)
    if wrong:
        raise click.exceptions.Exit(FINDING)


_SIGNS: Final = {"ok": ("\u2713", "green"), "wrong": ("\u2717", "red"), "unknown": ("\u2013", "yellow")}


@commands.command()
@click.option("--once", is_flag=True, help="Look twice, a second apart, print a table and end.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@click.option(
    "--sort",
    type=click.Choice(["instance", "requests", "in_progress", "p99", "memory", "cpu", "lag", "age"]),
    default="instance",
    show_default=True,
    help="What the largest of comes first.",
)
@click.option("--filter", "containing", default="", metavar="TEXT", help="Only instances that contain it: a host, say.")
@click.option("--interval", type=click.FloatRange(0.2), default=2.0, show_default=True, help="Seconds between looks.")
@_reads("service", "consul_service")
def top(settings: Settings, *, once: bool, as_json: bool, sort: str, containing: str, interval: float) -> None:
    """Show the workers of a service, on all hosts, as they are now. Ctrl-C ends it.

    prog: requests in progress; lag: of the event loop; scr: since somebody else scraped it. Exit code 1 with --once
    and --json: a worker cannot be read.

    \b
    Example:
      consul-prom top --service shop --sort p99 --filter web-1:
    """
    check_named(settings)
    single = once or as_json
    rows: list[Reading] = []

    async def work(agent: AgentClient) -> None:
        async with aclosing(watch(settings, agent, interval=1.0 if single else interval)) as looks:
            with nullcontext(lambda _rows: None) if single else Screen().live() as show:
                number = 0
                async for look in looks:
                    rows[:], number = ordered(look, by=sort, containing=containing), number + 1
                    show(_lines(rows, settings))
                    if single and number == 2:
                        return

    with suppress(KeyboardInterrupt):
        _with_agent(settings, work)
    if as_json:
        _print_json(asdict(row) for row in rows)
    elif once:
        Screen().verbatim("\n".join(_lines(rows, settings)))
    if single and any(row.state not in {"up", "adopted"} for row in rows):
        raise click.exceptions.Exit(FINDING)


def _lines(rows: Sequence[Reading], settings: Settings) -> list[str]:
    return [HEAD, line(total(rows)), *map(line, rows)] if rows else [_nothing(settings)]


@commands.group(cls=_Commands)
def config() -> None:
    """Print configuration."""


@config.command("acl")
@_reads("service", "consul_service")
def config_acl(settings: Settings) -> None:
    """Print the least ACL policies for workers, commands, Prometheus and agents; the agent is not asked."""
    click.echo(snippets.acl(settings), nl=False)


@config.command("prometheus")
@click.option("--all-services", is_flag=True, help="One job section for whatever consul-prom registers, by its tag.")
@click.option("--datacenter", default="", metavar="NAME", help="Consul's datacenter; the agent's own unless set.")
@_reads("service", "consul_service", "web_config")
def config_prometheus(settings: Settings, *, all_services: bool, datacenter: str) -> None:
    """Print the scrape configuration for Prometheus; the agent is not asked.

    \b
    Example:
      consul-prom config prometheus --service shop > /etc/prometheus/shop.yml
    """
    click.echo(snippets.prometheus(settings, all_services=all_services, datacenter=datacenter), nl=False)


@config.command("rules")
@_reads("service", "consul_service")
def config_rules(settings: Settings) -> None:
    """Print recording rules and alerts for Prometheus; the agent is not asked."""
    click.echo(rules.rules(settings), nl=False)


@config.command("grafana")
@_reads("service")
def config_grafana(settings: Settings) -> None:
    """Print a dashboard for Grafana; the agent is not asked."""
    click.echo(dashboard.grafana(settings), nl=False)


@config.command("settings")
def config_settings() -> None:
    """Print all settings; a pipe gets a table in Markdown."""
    screen = Screen()
    if screen.is_terminal:
        rows = [(row.env, row.kind, row.shown or row.default, row.help) for row in ROWS]
        screen.table(("variable", "type", "default", "meaning"), rows)
    else:
        click.echo(snippets.settings_table(), nl=False)


@commands.command()
@click.option("--keep", is_flag=True, help="Leave everything running until Ctrl-C.")
def demo(*, keep: bool) -> None:
    """Show it at work: Gunicorn, four workers, thirty requests. Needs no set-up and leaves nothing behind."""
    from consul_prom.demo import DemoError, run

    try:
        run(keep=keep, screen=Screen())
    except DemoError as error:
        raise _Failure(str(error)) from error


@commands.command()
@click.argument("shell", type=click.Choice(["bash", "fish", "zsh"]))
def completion(shell: str) -> None:
    """Print what completes our commands and options in a shell.

    \b
    Examples:
      consul-prom completion bash > ~/.config/consul-prom.bash   (and source it)
      consul-prom completion fish > ~/.config/fish/completions/consul-prom.fish
      consul-prom completion zsh > "${fpath[1]}/_consul-prom"
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise _Failure(f"click knows no completion for {shell}")
    source = kind(commands, {}, "consul-prom", "_CONSUL_PROM_COMPLETE").source()
    # click parts what fish gets at commas, which are in our words too.
    click.echo(source.replace('string split ","', 'string split --max 1 ","'))


@commands.command()
@click.option("--listen", metavar="HOST:PORT", default="127.0.0.1:8500", show_default=True, help="Where to listen.")
def agent(listen: str) -> None:
    """Run a Consul agent in memory, for development only: it keeps nothing, and anybody may write to it."""
    found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\]:([0-9]{1,5})|([\w.-]+):([0-9]{1,5})", listen, re.ASCII)
    if not found or int(found[2] or found[4]) > 65535:
        raise click.UsageError(f"--listen={listen!r} must be HOST:PORT")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        asyncio.run(_serve(found[1] or found[3], int(found[2] or found[4])))
    except OSError as error:
        raise _Failure(f"--listen={listen!r} cannot be had: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


async def _serve(host: str, port: int) -> None:
    from consul_prom.devagent import DevAgent

    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with DevAgent(host=host, port=port) as running:
        Screen().say(f"A Consul agent for development only, in memory: {running.url} (Ctrl-C ends it)")
        await ended.wait()


def _with_agent(settings: Settings, work: Callable[[AgentClient], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        client = AgentClient(settings)
        try:
            return await work(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


def _facts(entry: Entry, verdict: Verdict) -> dict[str, Any]:
    meta = entry.get("Meta") or {}
    return {
        "id": entry["ID"],
        "instance": meta.get("instance", ""),
        "service": meta.get("service", ""),
        "host": meta.get("host", ""),
        "slot": _number(meta.get("slot", "")),
        "pid": _number(meta.get("pid", "")),
        "address": entry.get("Address", ""),
        "port": entry.get("Port", 0),
        "adopted": "adopted" in meta,
        "state": verdict.state,
        "proof": verdict.proof,
    }


def _living(facts: Mapping[str, Any]) -> str:
    """Who is behind an adopted slot is alive, and not its worker."""
    return "adopted" if facts["adopted"] and facts["state"] == "alive" else str(facts["state"])


def _at(facts: Mapping[str, Any]) -> str:
    return origin(facts["address"], facts["port"]).removeprefix("http://")


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _nothing(settings: Settings) -> str:
    whose = f"of the service {settings.service}" if settings.service else "of consul-prom"
    return f"The agent at {settings.consul_http_addr} shows us no worker {whose}."


def _print_json(facts: Iterable[Mapping[str, Any]]) -> None:
    click.echo(json.dumps(list(facts), indent=2))
