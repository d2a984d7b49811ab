"""The command line. Exit codes: 0 nothing wrong, 1 a finding or something left undone, 2 usage, 3 no agent."""

import asyncio
import logging
import re
import signal
from collections.abc import Sequence
from contextlib import aclosing, nullcontext, suppress
from dataclasses import asdict
from typing import Final

import click
from click.shell_completion import get_completion_class

from consul_prom import __version__
from consul_prom.cli import services
from consul_prom.cli.command import (
    FINDING,
    Commands,
    Failure,
    NoAgent,
    nothing_found,
    print_json,
    reads,
    reason,
    with_agent,
)
from consul_prom.cli.console import Screen
from consul_prom.cli.top import HEAD, Reading, line, ordered, total, watch
from consul_prom.consul.client import AgentClient
from consul_prom.generate import grafana, rules, scrape_config
from consul_prom.generate.acl import acl
from consul_prom.generate.settings_table import settings_table
from consul_prom.settings.settings import ROWS, Settings, check_named


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="consul-prom", message="%(prog)s %(version)s")
def commands() -> None:
    """Metrics of a multi-process Python server: every worker its own Prometheus target, found through Consul.

    Every command reads the same environment variables as the workers; options beat them. What `config settings` shows
    and a command heeds is an option too, shown or not, but for secrets.

    Exit codes: 0 nothing wrong, 1 a finding or something left undone, 2 usage, 3 the agent cannot be reached, 141 the
    output is no longer read (`| head`).

    \b
    Examples:
      consul-prom demo
      consul-prom config prometheus --service shop
      CONSUL_HTTP_ADDR=https://consul:8501 consul-prom doctor --service shop
    """


commands.add_command(services.list_)
commands.add_command(services.deregister)


@commands.command()
@click.option("--prometheus", default="", metavar="URL", help="Also check that this Prometheus scrapes the workers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reads("service", "consul_service", "host", "address", "bind", "port", "dir", "ledger", "web_config")
def doctor(settings: Settings, *, prometheus: str, as_json: bool) -> None:
    """Look for what keeps workers from being registered or scraped.

    It says what to do, and does nothing itself. Run it on the workers' host, as their user and with their settings.

    \b
    Example:
      consul-prom doctor --service shop --prometheus http://prometheus:9090
    """
    from consul_prom.cli.doctor.checks import examine
    from consul_prom.cli.doctor.results import Finding

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

    with_agent(settings, work)
    if as_json:
        print_json(finding._asdict() for finding in findings)
    wrong = {finding.check for finding in findings if finding.state == "wrong"}
    if "agent" in wrong:
        raise click.exceptions.Exit(NoAgent.exit_code)
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
@reads("service", "consul_service")
def top(settings: Settings, *, once: bool, as_json: bool, sort: str, containing: str, interval: float) -> None:
    """Show the workers of a service on all hosts, live.

    Ctrl-C ends it. prog: requests in progress; lag: of the event loop; scr: since somebody else scraped it. Exit code 1
    with --once and --json: a worker cannot be read.

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
        with_agent(settings, work)
    if as_json:
        print_json(asdict(row) for row in rows)
    elif once:
        Screen().verbatim("\n".join(_lines(rows, settings)))
    if single and any(row.state not in {"up", "adopted"} for row in rows):
        raise click.exceptions.Exit(FINDING)


def _lines(rows: Sequence[Reading], settings: Settings) -> list[str]:
    return [HEAD, line(total(rows)), *map(line, rows)] if rows else [nothing_found(settings)]


@commands.group(cls=Commands)
def config() -> None:
    """Print what goes into other programs' configuration.

    No agent is asked.
    """


@config.command("acl")
@reads("service", "consul_service")
def config_acl(settings: Settings) -> None:
    """Print the least ACL policies of all who take part."""
    click.echo(acl(settings), nl=False)


@config.command("prometheus")
@click.option("--all-services", is_flag=True, help="One job section for whatever consul-prom registers, by its tag.")
@click.option("--datacenter", default="", metavar="NAME", help="Consul's datacenter; the agent's own unless set.")
@reads("service", "consul_service", "web_config")
def config_prometheus(settings: Settings, *, all_services: bool, datacenter: str) -> None:
    """Print a scrape configuration for Prometheus.

    \b
    Example:
      consul-prom config prometheus --service shop > /etc/prometheus/shop.yml
    """
    click.echo(scrape_config.prometheus(settings, all_services=all_services, datacenter=datacenter), nl=False)


@config.command("rules")
@reads("service", "consul_service")
def config_rules(settings: Settings) -> None:
    """Print recording rules and alerts for Prometheus."""
    click.echo(rules.rules(settings), nl=False)


@config.command("grafana")
@reads("service")
def config_grafana(settings: Settings) -> None:
    """Print a dashboard for Grafana."""
    click.echo(grafana.grafana(settings), nl=False)


@config.command("settings")
def config_settings() -> None:
    """Print all settings; a pipe gets a table in Markdown."""
    screen = Screen()
    if screen.is_terminal:
        rows = [(row.env, row.kind, row.shown or row.default, row.help) for row in ROWS]
        screen.table(("variable", "type", "default", "meaning"), rows)
    else:
        click.echo(settings_table(), nl=False)


@commands.command()
@click.option("--keep", is_flag=True, help="Leave everything running until Ctrl-C.")
def demo(*, keep: bool) -> None:
    """Show it at work: Gunicorn, four workers, thirty requests.

    It needs no set-up and leaves nothing behind.
    """
    from consul_prom.cli.demo import run

    run(keep=keep, screen=Screen())


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
        raise Failure(f"click knows no completion for {shell}")
    source = kind(commands, {}, "consul-prom", "_CONSUL_PROM_COMPLETE").source()
    # click parts what fish gets at commas, which are in our words too.
    click.echo(source.replace('string split ","', 'string split --max 1 ","'))


@commands.command()
@click.option("--listen", metavar="HOST:PORT", default="127.0.0.1:8500", show_default=True, help="Where to listen.")
def agent(listen: str) -> None:
    """Run a Consul agent in memory, for development only.

    It keeps nothing, and anybody may write to it.
    """
    found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\]:([0-9]{1,5})|([\w.-]+):([0-9]{1,5})", listen, re.ASCII)
    if not found or int(found[2] or found[4]) > 65535:
        raise click.UsageError(f"--listen={listen!r} must be HOST:PORT")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        asyncio.run(_serve(found[1] or found[3], int(found[2] or found[4])))
    except OSError as error:
        raise Failure(f"--listen={listen!r} cannot be had: {reason(error)}") from error


async def _serve(host: str, port: int) -> None:
    from consul_prom.devagent import DevAgent

    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with DevAgent(host=host, port=port) as running:
        Screen().say(f"A Consul agent for development only, in memory: {running.url} (Ctrl-C ends it)")
        await ended.wait()
