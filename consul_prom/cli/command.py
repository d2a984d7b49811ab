"""What all commands share: their exit codes, the settings as options, the agent, and JSON.

Exit codes: 0 nothing wrong, 1 a finding or something left undone, 2 usage, 3 no agent, 141 nobody reads the output.
"""

import asyncio
import errno
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Final, TypeVar

import click

from consul_prom.consul.client import AgentClient
from consul_prom.errors import AgentConfused, AgentTimeout, AgentUnreachable, ConsulPromError, SettingsError
from consul_prom.settings.settings import ROWS, Row, Settings, load

T = TypeVar("T")

FINDING: Final = 1


class Failure(click.ClickException):
    exit_code = FINDING


class _Usage(click.ClickException):
    exit_code = 2


class NoAgent(click.ClickException):
    exit_code = 3


class Commands(click.Group):
    """Says what we expect to go wrong in one sentence."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise _Usage(str(error)) from error
        except (AgentUnreachable, AgentTimeout, AgentConfused) as error:
            raise NoAgent(str(error)) from error
        except ConsulPromError as error:
            raise Failure(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise _unread() from error
            raise Failure(reason(error)) from error


def _unread() -> click.exceptions.Exit:
    """The reader of our output is gone, as `head` is: exit like a program that SIGPIPE ended, which is no finding."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it exits
    return click.exceptions.Exit(128 + signal.SIGPIPE)


def reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


_SHOWN: Final = {"service", "consul_service", "host", "consul_http_addr", "consul_http_token_file"}


def reads(*names: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
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


def with_agent(settings: Settings, work: Callable[[AgentClient], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        client = AgentClient(settings)
        try:
            return await work(client)
        finally:
            await client.aclose()

    return asyncio.run(run())


def nothing_found(settings: Settings) -> str:
    whose = f"of the service {settings.service}" if settings.service else "of consul-prom"
    return f"The agent at {settings.consul_http_addr} shows us no worker {whose}."


def print_json(facts: Iterable[Mapping[str, Any]]) -> None:
    click.echo(json.dumps(list(facts), indent=2))
