"""The commands about what stands in the agent: which entries there are, who lives behind them, and what to remove."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import click

from consul_prom.cli.command import FINDING, nothing_found, print_json, reads, with_agent
from consul_prom.cli.console import Screen
from consul_prom.consul import stale
from consul_prom.consul.client import AgentClient
from consul_prom.consul.registration import is_on, origin
from consul_prom.consul.stale import Entry, Liveness, ReapResult
from consul_prom.ledger import file as ledger_file
from consul_prom.ledger.file import Contents, Family, Series
from consul_prom.settings.settings import Settings


@click.command("list")
@click.option("--ledger", "saved", is_flag=True, help="List what the ledgers of --dir hold instead; asks no agent.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reads("service", "host", "dir")
def list_(settings: Settings, *, saved: bool, as_json: bool) -> None:
    """List the workers that the agent knows, and whether they live.

    The lock of its slot or its process tells whether a worker lives; both can be seen on its own host only. Of a slot
    that is adopted a sibling serves the last page.

    \b
    Example:
      consul-prom list --json | jq -r '.[] | select(.status=="critical").id'
    """
    if saved:
        _list_saved(settings, as_json=as_json)
        return
    found = with_agent(settings, lambda agent: _look(agent, settings))
    facts = [{**_facts(entry, verdict), "status": status} for entry, verdict, status in found]
    if as_json:
        print_json(facts)
    elif facts:
        columns = ("instance", "service", "pid", "address", "status", "worker", "proof")
        rows = [
            [fact["instance"], fact["service"], fact["pid"], _at(fact), fact["status"], _living(fact), fact["proof"]]
            for fact in facts
        ]
        Screen().table(columns, rows, numbers=("pid",))
    else:
        Screen().say(nothing_found(settings))


def _list_saved(settings: Settings, *, as_json: bool) -> None:
    """A line for each metric of each ledger."""
    columns = ("service", "slot", "instance", "metric", "type", "series", "unused", "total")
    facts = [
        dict(zip(columns, row, strict=True))
        for path, contents in ledger_file.in_directory(settings.dir, settings.service)
        for row in _saved(path, contents)
    ]
    if as_json:
        print_json(facts)
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
        unused = sum(one.used != ledger_file.IN_USE for one in series)
        counted = sum(one.count for one in series)
        instance = contents.head.get("instance", "?")
        yield service, int(slot), instance, family.name, family.kind, len(series), unused, counted


async def _look(agent: AgentClient, settings: Settings) -> list[tuple[Entry, Liveness, str]]:
    found = []
    for entry in await stale.entries(agent, service=settings.service):
        checks = {check.get("Status") for check in await agent.checks(entry["ID"])}
        status = next((worst for worst in ("critical", "warning") if worst in checks), "passing")
        with stale.judged(entry, host=settings.host) as verdict:
            found.append((entry, verdict, status))
    return found


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed; exit code 1 if there is any.")
@click.option("--id", "ids", metavar="ID", multiple=True, help="Remove this entry, alive or not; may be repeated.")
@click.option("--all", "everything", is_flag=True, help="Remove all entries of this host (and service), alive or not.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reads("service", "host")
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
    outcomes: list[ReapResult] = []
    elsewhere: list[Entry] = []

    async def work(agent: AgentClient) -> None:
        if ids:
            found = [await _entry(agent, entry_id) for entry_id in dict.fromkeys(ids)]
        else:
            every = await stale.entries(agent, service=settings.service)
            found = [entry for entry in every if is_on(entry, settings.host)]
            elsewhere.extend(entry for entry in every if entry not in found)
        sweep = stale.sweep(agent, found, host=settings.host, forced=everything or bool(ids), dry_run=dry_run)
        async with aclosing(sweep):
            async for outcome in sweep:
                outcomes.append(outcome)  # noqa: PERF401  # what was done is told, even where the next call fails

    try:
        with_agent(settings, work)
    finally:
        if as_json:
            print_json(_facts(it.entry, it.verdict) | {"action": it.action, "trouble": it.trouble} for it in outcomes)
        elif outcomes or elsewhere:
            _tell(outcomes, elsewhere)
    if not (as_json or outcomes or elsewhere):
        Screen().say(nothing_found(settings))
    if any(map(_undone, outcomes)):
        raise click.exceptions.Exit(FINDING)


async def _entry(agent: AgentClient, entry_id: str) -> Entry:
    entry = await agent.service(entry_id)
    return entry.document if entry else {"ID": entry_id}


def _undone(outcome: ReapResult) -> bool:
    unproven = outcome.action == "kept" and outcome.verdict.state == "unknown"
    return unproven or outcome.action in {"would remove", "refused", "failed"}


def _tell(outcomes: Sequence[ReapResult], elsewhere: Sequence[Entry]) -> None:
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


def _lives_on(outcome: ReapResult) -> bool:
    return outcome.action == "kept" and outcome.verdict.state == "alive"


def _why(outcome: ReapResult) -> str:
    if outcome.trouble:
        return outcome.trouble
    again = outcome.action in {"removed", "would remove"} and outcome.verdict.state == "alive"
    return outcome.verdict.proof + ("; it registers again within seconds" if again else "")


def _facts(entry: Entry, verdict: Liveness) -> dict[str, Any]:
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
