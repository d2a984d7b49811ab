"""The page of Gunicorn's masters, made from the files in which each master keeps its counts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from consul_prom.process.identity import is_gone

LOG_LINES: Final = ("gunicorn_log_lines", "Lines of Gunicorn's error log, of the level and above that it is set to.")


class MasterPage:
    """The live masters of a service and directory, as a collector for their page."""

    def __init__(self, directory: Path, service: str) -> None:
        self._directory = directory
        self._service = service

    def living(self) -> dict[str, Mapping[str, Any]]:
        """The tallies by the masters' numbers. Files of the dead stay: the next master takes them."""
        prefix = f"{self._service}.master."
        paths = {path.name.removeprefix(prefix): path for path in self._directory.glob(f"{prefix}*")}
        found = {number: read_tally(path) for number, path in sorted(paths.items()) if number.isdecimal()}
        return {number: tally for number, tally in found.items() if tally}

    def complete(self, workers: int) -> bool:
        """Whether the masters, of which there are some, have all the workers they want, and *workers* are no fewer."""
        tallies = self.living().values()
        alive, wanted = (sum(tally[key] for tally in tallies) for key in ("alive", "wanted"))
        return bool(tallies) and wanted <= alive <= workers

    def collect(self) -> Iterator[Metric]:
        wanted = GaugeMetricFamily("gunicorn_workers_wanted", "Workers that the master shall have.", labels=["master"])
        alive = GaugeMetricFamily("gunicorn_workers", "Workers that the master has.", labels=["master"])
        exits = CounterMetricFamily(
            "gunicorn_worker_exits",
            "Workers that ended, by reason: signal, timeout, max_requests, boot, error (an exit code), stop (as told).",
            labels=["master", "reason", "signal"],
        )
        lines = CounterMetricFamily(*LOG_LINES, labels=["master", "level"])
        for number, tally in self.living().items():
            wanted.add_metric([number], tally["wanted"])
            alive.add_metric([number], tally["alive"])
            for reason, signal, count in tally["exits"]:
                exits.add_metric([number, reason, signal], count)
            for level, count in tally["lines"].items():
                lines.add_metric([number, level], count)
        yield from (wanted, alive, exits, lines)
        yield from self._counted().values()

    def _counted(self) -> dict[str, Metric]:
        """Return the masters' own counts, as of an application that they preload. No worker shows these."""
        found: dict[str, Metric] = {}
        for number, tally in self.living().items():
            # An older version writes no "counted".
            for name, documentation, kind, unit, samples in tally.get("counted", ()):
                metric = found.setdefault(name, Metric(name, documentation, kind, unit))
                for sample, labels, value in samples if metric.type == kind else ():
                    metric.add_sample(sample, {"master": number, **labels}, value)
        return found

    def registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(self)
        return registry


def read_tally(path: Path) -> Mapping[str, Any] | None:
    """What a live master wrote, or None."""
    try:
        tally: Mapping[str, Any] = json.loads(path.read_text(encoding="ascii"))
        return None if is_gone(tally["pid"], tally["proc"]) else tally
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
