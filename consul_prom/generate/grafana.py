"""Grafana's dashboard of a service, as JSON to import or to provision. Pure.

A panel is a row of a table here; Grafana's model is made of them at the end.
https://grafana.com/docs/grafana/latest/visualizations/dashboards/build-dashboards/view-dashboard-json-model/
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from consul_prom.settings.settings import Settings

SCHEMA: Final = 39
WIDTH: Final = 24
HEIGHT: Final = 8
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_ALL: Final = 'job="$job", instance=~"$instance"'
_EVERY_WORKER: Final = ".+:[0-9]+"
"""Of the instances; one more, <host>:master, is the page of Gunicorn's master."""


class Panel(NamedTuple):
    """*queries* are pairs of PromQL and the legend of its series."""

    title: str
    about: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    width: int = 8
    kind: str = "timeseries"


def _quantile(share: float, by: str) -> str:
    rate = f"rate(http_request_duration_seconds_bucket{{{_ALL}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by (le, {by}) ({rate}))"


def _rate(name: str, by: str, more: str = "") -> str:
    return f"sum by ({by}) (rate({name}{{{_ALL}{more}}}[$__rate_interval]))"


_ERROR_SHARE: Final = (
    f"(sum(rate(http_requests_total{{{_ALL}, status=~'5..'}}[$__rate_interval])) or vector(0)) "
    f"/ sum(rate(http_requests_total{{{_ALL}}}[$__rate_interval]))"
)
_RENDERING: Final = (
    f"max(rate(consul_prom_scrape_duration_seconds_sum{{{_ALL}}}[$__rate_interval]) "
    f"/ rate(consul_prom_scrape_duration_seconds_count{{{_ALL}}}[$__rate_interval]))"
)

_FAILED: Final = _rate("http_requests_total", "route", ', status=~"5.."')

ROWS: Final[Mapping[str, tuple[Panel, ...]]] = {
    "At a glance": (
        Panel("Workers up", "", "none", ((f"count(consul_prom_worker_info{{{_ALL}}})", ""),), 4, "stat"),
        Panel("Rate", "Requests a second.", "reqps", ((_rate("http_requests_total", "job"), ""),), 4, "stat"),
        Panel(
            "Errors",
            "Share of answers 5xx.",
            "percentunit",
            ((_ERROR_SHARE, ""),),
            4,
            "stat",
        ),
        Panel("99th percentile", "", "s", ((_quantile(0.99, "job"), ""),), 4, "stat"),
        Panel("Registered", "", "none", ((f"sum(consul_prom_registered{{{_ALL}}})", ""),), 4, "stat"),
        Panel("Memory", "", "bytes", ((f"sum(process_resident_memory_bytes{{{_ALL}}})", ""),), 4, "stat"),
    ),
    "Requests": (
        Panel("Requests by route", "", "reqps", ((_rate("http_requests_total", "route"), "{{route}}"),)),
        Panel("Requests by status", "", "reqps", ((_rate("http_requests_total", "status"), "{{status}}"),)),
        Panel(
            "Errors by route",
            "Answers 5xx.",
            "reqps",
            ((f"{_FAILED} or 0 * {_rate('http_requests_total', 'route')}", "{{route}}"),),
        ),
        Panel("Median by route", "", "s", ((_quantile(0.5, "route"), "{{route}}"),)),
        Panel("99th percentile by route", "", "s", ((_quantile(0.99, "route"), "{{route}}"),)),
        Panel(
            "In progress by route",
            "",
            "none",
            ((f"sum by (route) (http_requests_in_progress{{{_ALL}}})", "{{route}}"),),
        ),
    ),
    "Workers": (
        Panel("Requests by worker", "", "reqps", ((_rate("http_requests_total", "instance"), "{{instance}}"),)),
        Panel(
            "In progress by worker",
            "One that stays above the others is stuck.",
            "none",
            ((f"sum by (instance) (http_requests_in_progress{{{_ALL}}})", "{{instance}}"),),
        ),
        Panel("99th percentile by worker", "", "s", ((_quantile(0.99, "instance"), "{{instance}}"),)),
    ),
    "Saturation": (
        Panel(
            "Processor",
            "1 is one core, which is all that a worker's Python can have.",
            "none",
            ((f"rate(process_cpu_seconds_total{{{_ALL}}}[$__rate_interval])", "{{instance}}"),),
            6,
        ),
        Panel("Memory by worker", "", "bytes", ((f"process_resident_memory_bytes{{{_ALL}}}", "{{instance}}"),), 6),
        Panel(
            "Event loop lag",
            "How long a callback of the application waits.",
            "s",
            ((f"consul_prom_event_loop_lag_seconds{{{_ALL}}}", "{{instance}}"),),
            6,
        ),
        Panel(
            "Open files",
            "Share of what the process may open.",
            "percentunit",
            ((f"process_open_fds{{{_ALL}}} / process_max_fds{{{_ALL}}}", "{{instance}}"),),
            6,
        ),
    ),
    "Life of the workers": (
        Panel(
            "Up",
            "1 also where a sibling serves the last page of a worker that nobody replaces.",
            "none",
            ((f"up{{{_ALL}}}", "{{instance}}"),),
        ),
        Panel("Age", "", "s", ((f"time() - process_start_time_seconds{{{_ALL}}}", "{{instance}}"),)),
        Panel(
            "Starts in the last hour",
            "A worker's successor has its instance.",
            "none",
            ((f"changes(process_start_time_seconds{{{_ALL}}}[1h])", "{{instance}}"),),
        ),
    ),
    "Gunicorn's master": (
        Panel(
            "Workers alive and wanted",
            "Told by the master, where our hooks run.",
            "none",
            (
                ('sum by (instance) (gunicorn_workers{job="$job"})', "{{instance}} alive"),
                ('sum by (instance) (gunicorn_workers_wanted{job="$job"})', "{{instance}} wanted"),
            ),
        ),
        Panel(
            "Worker exits by reason",
            "stop: as told, by a reload say; signal SIGKILL: mostly the kernel, out of memory.",
            "none",
            (
                (
                    'sum by (reason, signal) (increase(gunicorn_worker_exits_total{job="$job"}[$__rate_interval]))',
                    "{{reason}} {{signal}}",
                ),
            ),
        ),
        Panel(
            "Log lines by level",
            "Of Gunicorn's error log: the master's and the workers'.",
            "none",
            (('sum by (level) (rate(gunicorn_log_lines_total{job="$job"}[$__rate_interval]))', "{{level}}"),),
        ),
    ),
    "Registration and scrapes": (
        Panel(
            "Registrations by reason",
            "Of all workers that a slot has had. start: one began; lost, changed: somebody took or edited the entry.",
            "none",
            ((f"sum by (reason) (consul_prom_registrations_total{{{_ALL}}})", "{{reason}}"),),
            6,
        ),
        Panel(
            "Failed talks with the agent",
            "Since the workers began.",
            "none",
            ((f"sum by (reason) (consul_prom_sync_failures_total{{{_ALL}}}) or vector(0)", "{{reason}}"),),
            6,
        ),
        Panel(
            "Time of a scrape",
            "As Prometheus sees it, and the worker's part of it.",
            "s",
            (
                (f"max(scrape_duration_seconds{{{_ALL}}})", "slowest, whole"),
                (_RENDERING, "slowest, rendering"),
            ),
            6,
        ),
        Panel(
            "Samples of a scrape",
            "What the service costs Prometheus.",
            "none",
            ((f"sum(scrape_samples_scraped{{{_ALL}}})", "all workers"),),
            6,
        ),
    ),
}


def grafana(settings: Settings) -> str:
    """The dashboard; the service, if one is set, is what it shows at first."""
    board = {
        "uid": "consul-prom",
        "title": "consul-prom: workers of a service",
        "tags": ["consul-prom"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "annotations": {"list": []},
        "templating": {"list": list(_variables(settings))},
        "panels": list(_panels()),
    }
    return json.dumps(board, indent=2) + "\n"


def _variables(settings: Settings) -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    chosen = {"current": {"text": settings.service, "value": settings.service}} if settings.service else {}
    yield {**_variable("job", "Service", "label_values(consul_prom_worker_info, job)"), **chosen}
    workers = _variable("instance", "Worker", 'label_values(consul_prom_worker_info{job="$job"}, instance)')
    everyone = {
        "multi": True,
        "includeAll": True,
        "allValue": _EVERY_WORKER,
        "current": {"text": "All", "value": "$__all"},
    }
    yield {**workers, **everyone}


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    # Asked for anew with each change of the time range (2), in the order of names (1).
    kind = {"type": "query", "datasource": _SOURCE, "refresh": 2, "sort": 1}
    return {"name": name, "label": label, **kind, "query": {"query": query, "refId": name}}


def _panels() -> Iterator[dict[str, Any]]:
    number, top = 1, 0
    for title, panels in ROWS.items():
        place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        number, top, left = number + 1, top + 1, 0
        height = HEIGHT // 2 if panels[0].kind == "stat" else HEIGHT
        for panel in panels:
            if left + panel.width > WIDTH:
                top, left = top + height, 0
            yield _panel(panel, number, {"x": left, "y": top, "w": panel.width, "h": height})
            number, left = number + 1, left + panel.width
        top += height


def _panel(panel: Panel, number: int, place: Mapping[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "gridPos": dict(place),
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


# All that Grafana's schema requires, though Grafana itself fills most of it in.
_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"]},
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
        "wideLayout": True,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
    },
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
}
