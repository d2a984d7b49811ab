"""The table, as Markdown."""

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from tests.bench.headtohead.contender import load

OURS: Final = "ours"
CONTROL: Final = "nothing"
"""Who takes no part."""
EQUAL: Final = 1.1
"""Times the best; less than that is no difference on a machine that others use too."""
MORE_IS_BETTER: Final = ("requests a second at most",)
NO_MATTER: Final = ("series in Prometheus", "CPU of workers", "CPU of beside", "CPU of prometheus")
"""Parts of other rows, and what follows from having targets."""
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
    "on disk",
    "memory of what runs beside, MiB more",
    "scrapes missed",
    "requests failed",
    "CPU of workers",
    "CPU of beside",
    "CPU of prometheus",
    "series in",
)


@dataclass
class Results:
    """By row and contender: what was measured; and what could not be, with its reason."""

    names: Sequence[str]
    figures: dict[str, dict[str, Sequence[float]]] = field(default_factory=dict)
    reasons: list[tuple[str, str, str]] = field(default_factory=list)
    """Contender, part of the run, reason."""

    def add(self, name: str, part: str, figures: Mapping[str, Sequence[float]] | str) -> None:
        if isinstance(figures, str):
            self.reasons.append((name, part, figures))
        else:
            for row, values in figures.items():
                self.figures.setdefault(row, {})[name] = values

    def rows(self) -> list[str]:
        """As the table has them: of the same kind together."""
        return sorted(self.figures, key=lambda row: next(i for i, kind in enumerate(ORDER) if row.startswith(kind)))

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
    titles = [load(name).title for name in results.names]
    lines = [head, "", f"| | {' | '.join(titles)} | consul-prom is |", f"|---{'|---:' * len(titles)}|---|"]
    for row in results.rows():
        cells = [_cell(results, row, name) for name in results.names]
        lines.append(f"| {row} | {' | '.join(cells)} | {verdict(results, row)} |")
    lines += ["", *(f"- **{load(name).title}**: {load(name).how}" for name in results.names)]
    if results.reasons:
        lines += ["", "**Not measured:**", ""]
        lines += [f"- {load(name).title}, {part}: {reason}" for name, part, reason in results.reasons]
    return "\n".join([*lines, ""])


def verdict(results: Results, row: str) -> str:
    """How we stand among all that take part."""
    ours = results.median(row, OURS)
    others = {name: results.median(row, name) for name in results.names if name not in {OURS, CONTROL}}
    known = {name: value for name, value in others.items() if value is not None}
    if row.startswith(NO_MATTER) or ours is None or not known:
        return ""
    more = row.startswith(MORE_IS_BETTER)
    best = (max if more else min)(known, key=lambda name: known[name])
    better, worse = (ours, known[best]) if more else (known[best], ours)
    if worse <= better * EQUAL or f"{worse:.2g}" == f"{better:.2g}":
        factor = better / worse if worse else 1.0
        return f"**first**, {factor:.1f} x" if factor > EQUAL else "equal"
    behind = f"{worse / better:.1f} x" if better > 0 else f"{ours:.3g} to 0"
    return f"behind, {behind} {load(best).title}"


def _cell(results: Results, row: str, name: str) -> str:
    values = results.figures[row].get(name)
    if not values:
        return "**not run**" if any(reason[0] == name for reason in results.reasons) else "-"
    middle = short(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} <sub>{short(min(values))} to {short(max(values))}</sub>"


def short(value: float) -> str:
    """Three digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
