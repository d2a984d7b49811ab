"""The table, as Markdown."""

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from tests.bench.headtohead.contender import load
from tests.bench.headtohead.plan import CONTROL, OURS

EQUAL: Final = 1.1
"""Times the best; less than that is no difference, nor are spreads that meet."""
MORE_IS_BETTER: Final = ("requests a second at most", "counters in Prometheus")
GENERATOR: Final = "CPU of the load generator"
"""The same work whoever answers: what differs here is the machine's mood."""
EVENED: Final = ("CPU of everything", "CPU of workers", "CPU of beside", "CPU of prometheus")
NO_MATTER: Final = ("series in Prometheus", *EVENED[1:], GENERATOR)
"""Parts of other rows, and what follows from having targets."""
LEGEND: Final = (
    "Each request does a little work, counts one hit and observes one time, of other labels each time; there are "
    "200 a second, but for the row that says at most. Half of a worker's series are counters, half are histograms "
    "of 11 series; `_created` is off for all. Medians, and <sub>quartiles</sub> (of less than four: least and "
    "most). CPU is evened: divided by what the load generator, the same work for all, took in the same seconds, "
    "times its average. *Equal* is within 10 %, where spreads meet, or, for times of requests and scrapes, within "
    "what the load generator differed by."
)
OF_SCRAPES: Final = ("one scrape", "scrapes missed")
"""Who is not scraped has none of these."""
WHY: Final = {
    "one inc": "it adds to mapped memory, which outlives a kill -9, where others of that speed add to an attribute",
    "one observe": "the same, twice",
    "CPU of everything": "Prometheus asks for, reads and keeps a page a worker, where others merge or sum, and one of "
    "the workers looks after the dead of all",
    "one scrape": "Prometheus asks each worker and the master, here summed; in parallel, and spread over the interval",
    "request p99": "not explained; it moves as much from row to row where nothing is counted",
    "worker start": "Prometheus asks Consul, and takes up what is new, each 5 s; a sum has no new target",
    "memory a worker": "aiohttp and the agent's client are in each worker, next to prometheus_client",
    "memory of what runs beside": "the Consul agent, which a host with Consul runs anyway",
    "more memory of what runs beside": "the Consul agent, whose heap grows a little with traffic",
    "more on disk": "a slot's files, which its next worker goes on with",
}
"""Where we are behind: for what."""
ORDER: Final = (
    "one inc",
    "one observe",
    "CPU of everything",
    "one scrape",
    "request p50",
    "request p99",
    "requests a second",
    "worker start",
    "memory a worker",
    "memory of what runs beside, MiB:",
    "more on disk",
    "more memory of what runs beside",
    "counters in Prometheus",
    "scrapes missed",
    "requests failed",
    "CPU of workers",
    "CPU of beside",
    "CPU of prometheus",
    GENERATOR,
    "series in",
)


@dataclass
class Results:
    """By row and contender: what was measured; and what could not be, with its reason."""

    names: Sequence[str]
    figures: dict[str, dict[str, Sequence[float]]] = field(default_factory=dict)
    reasons: list[tuple[str, str, str]] = field(default_factory=list)
    """Contender, part of the run, reason."""

    def add(self, name: str, part: str, figures: Mapping[str, Sequence[float]], reason: str = "") -> None:
        """*reason*: why these are not all."""
        for row, values in figures.items():
            self.figures.setdefault(row, {})[name] = values
        if reason:
            self.reasons.append((name, part, reason))

    def rows(self) -> list[str]:
        """As the table has them: of the same kind together."""
        return sorted(self.figures, key=lambda row: next(i for i, kind in enumerate(ORDER) if row.startswith(kind)))

    def even(self) -> None:
        """Scale what was used of the CPU to a machine that is equally fast for all, as the load generator tells."""
        for row, by_name in self.figures.items():
            generator = self._generator(row)
            if row.startswith(EVENED) and generator:
                usual = statistics.median(generator.values())
                for name, values in by_name.items():
                    by_name[name] = [value * usual / generator[name] for value in values]

    def unevenness(self, row: str) -> float:
        """How many times the least the most of the load generator's CPU is, while *row* was taken."""
        used = self._generator(row).values()
        return 1.0 if row.startswith(EVENED) or not used else max(used) / min(used)

    def _generator(self, row: str) -> dict[str, float]:
        found = self.figures.get(f"{GENERATOR}, s per 1,000 requests: {row.partition(': ')[2]}", {})
        return {name: values[0] for name, values in found.items()}

    def same(self, row: str) -> bool:
        """Whether all that were measured had the same, as where no request failed; not where only one was."""
        shown = [short(statistics.median(values)) for values in self.figures[row].values()]
        return len(shown) > 1 and len(set(shown)) == 1 and not row.startswith(GENERATOR)

    def complete(self, row: str, name: str) -> bool:
        """Whether Prometheus had what the contender counted, while *row* was taken: doing less is no way to win."""
        server = row.partition(": ")[2].partition(", scraped")[0]
        seen = self.median(f"counters in Prometheus, %: {server}", name)
        return seen is None or seen >= 99

    def median(self, row: str, name: str) -> float | None:
        values = self.figures.get(row, {}).get(name)
        return statistics.median(values) if values else None


def machine() -> str:
    """Date and machine, in a line."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    kind = f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release().split('-')[0]}"
    return f"{now}; {kind}; Python {platform.python_version()}"


def markdown(results: Results, *, head: str) -> str:
    """The table, its legend, and whatever was not run."""
    telling = [row for row in results.rows() if not results.same(row)]
    judged = [row for row in telling if not row.startswith(NO_MATTER)]
    others = [row for row in telling if row.startswith(NO_MATTER)]
    lines = [head, "", *_table(results, judged), "", LEGEND]
    if same := [row for row in results.rows() if results.same(row)]:
        lines += ["", f"The same for all: {'; '.join(same)}."]
    lines += ["", "<details><summary>Parts of these, and the load generator</summary>", "", *_table(results, others)]
    lines += ["", "</details>", "", *(f"- **{load(name).title}**: {load(name).how}" for name in results.names)]
    lines += ["", *_excuses(results)]
    if results.reasons:
        lines += ["", "**Not measured:**", ""]
        lines += [f"- {load(name).title}, {part}: {reason}" for name, part, reason in results.reasons]
    return "\n".join([*lines, ""])


def _table(results: Results, rows: Sequence[str]) -> list[str]:
    titles = [load(name).title for name in results.names]
    lines = [f"| | {' | '.join(titles)} | consul-prom is |", f"|---{'|---:' * len(titles)}|---|"]
    for row in rows:
        cells = [_cell(results, row, name) for name in results.names]
        lines.append(f"| {row} | {' | '.join(cells)} | {verdict(results, row)} |")
    return lines


def _excuses(results: Results) -> list[str]:
    behind = [row for row in results.rows() if verdict(results, row).startswith("behind")]
    return [f"- behind in *{kind}*: {why}" for kind, why in WHY.items() if any(row.startswith(kind) for row in behind)]


def verdict(results: Results, row: str) -> str:
    """How we stand among all that take part."""
    ours = results.median(row, OURS)
    others = {name: results.median(row, name) for name in results.names if name not in {OURS, CONTROL}}
    known = {name: value for name, value in others.items() if value is not None and results.complete(row, name)}
    if row.startswith(NO_MATTER) or ours is None or not known:
        return ""
    more = row.startswith(MORE_IS_BETTER)
    best = (max if more else min)(known, key=lambda name: known[name])
    gain, least = _gain(ours, known[best], more=more), max(EQUAL, results.unevenness(row))
    if _meet(results.figures[row][OURS], results.figures[row][best]):
        return "equal"
    if gain > least:
        return f"**first**, by {gain:.1f} x" if gain < math.inf else "**first**"
    if gain * least >= 1:
        return "equal"
    return f"behind, {1 / gain:.1f} x {load(best).title}" if gain else f"behind, {short(ours)} to 0"


def _meet(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two spreads have something in common; single figures have none."""
    if len(ours) < 2 or len(theirs) < 2:
        return False
    (low, high), (least, most) = spread(ours), spread(theirs)
    return low <= most and least <= high


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles, or of few values the least and the most."""
    if len(values) < 4:
        return min(values), max(values)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _gain(ours: float, theirs: float, *, more: bool) -> float:
    """How many times as good we are."""
    if short(ours) == short(theirs) or (not more and ours <= theirs <= 0):
        return 1.0
    above, below = (ours, theirs) if more else (theirs, ours)
    return above / below if below else math.inf


def _cell(results: Results, row: str, name: str) -> str:
    values = results.figures[row].get(name)
    if not values and row.startswith(OF_SCRAPES) and not load(name).scraped:
        return "-"
    if not values:
        return "**not run**" if any(reason[0] == name for reason in results.reasons) else "-"
    middle = short(statistics.median(values))
    if len(values) == 1:
        return middle
    low, high = map(short, spread(values))
    return f"{middle} <sub>{low} to {high}</sub>"


def short(value: float) -> str:
    """Three digits, without an exponent."""
    if abs(value) < 0.005:
        return "0.00"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
