"""Prometheus' rules for one service: what takes the instance away, and alerts. Pure.

Every alert has one question: would somebody get up for it? A deploy, a reload and a scale-down are none, so each holds
for longer than those last. https://prometheus.io/docs/prometheus/latest/configuration/recording_rules/
"""

import json
from collections.abc import Iterator
from typing import Final, NamedTuple

from consul_prom.settings.settings import Settings, check_named

WINDOW: Final = "5m"


class _Record(NamedTuple):
    name: str
    expression: str


class _Alert(NamedTuple):
    """*hold* is how long it must be so; *why* a comment; *cure* what to do."""

    name: str
    why: str
    expression: str
    hold: str
    severity: str
    summary: str
    cure: str


RECORDS: Final = (
    _Record(
        "job_method_route_status:http_requests:rate5m", "sum without (instance) (rate(http_requests_total{JOB}[5m]))"
    ),
    *(
        _Record(
            f"job_method_route{level}:http_request_duration_seconds_{part}:rate5m",
            f"sum without (instance) (rate(http_request_duration_seconds_{part}{{JOB}}[5m]))",
        )
        for level, part in (("_le", "bucket"), ("", "sum"), ("", "count"))
    ),
    _Record(
        "job_method_route:http_requests_in_progress:sum", "sum without (instance) (http_requests_in_progress{JOB})"
    ),
    # Of those that live: the page of an adopted slot, and the master's, do not have it.
    _Record("job:workers:count", "count by (job) (consul_prom_worker_info{JOB})"),
)

ALERTS: Final = (
    _Alert(
        "ConsulPromWorkerDown",
        "A worker that ends is deregistered, one that is killed is removed within seconds: this one hangs, or its port"
        " cannot be reached.",
        "up{WORKERS} == 0",
        "2m",
        "warning",
        "{{ $labels.instance }} of SERVICE is registered and cannot be scraped",
        "consul-prom doctor on its host; Prometheus' page of targets has the error.",
    ),
    _Alert(
        "ConsulPromNoWorker",
        "Whoever is not there has no series that could be 0, and with the last worker the page of Gunicorn's master is"
        " gone: only what is absent tells. A restart is shorter.",
        "absent(up{WORKERS} == 1)",
        "5m",
        "critical",
        "SERVICE has no worker that can be scraped",
        "Is it meant to run? Its server's log says why no worker starts; consul-prom doctor on its host finds more.",
    ),
    _Alert(
        "ConsulPromEntryStays",
        "The agent removes an entry that was critical for DEREGISTER_AFTER, 10 min unless set. Where it does not, it is"
        " dead itself, or its servers do not hear of it.",
        "up{JOB} == 0",
        "15m",
        "warning",
        "The entry of {{ $labels.instance }} of SERVICE stays, though nobody is there",
        "consul-prom deregister on its host; if the host is gone: consul force-leave <node>.",
    ),
    _Alert(
        "ConsulPromCrashLoop",
        "A worker's successor has its instance and a later start. Twice the starts of a busy afternoon of deploys.",
        "changes(process_start_time_seconds{JOB}[10m]) >= 5 unless resets(process_start_time_seconds{JOB}[10m]) > 1",
        "0m",
        "critical",
        "{{ $labels.instance }} of SERVICE began {{ $value }} times anew within 10 minutes",
        "The server's log says why its workers end; a max_requests that is reached within two minutes looks the same.",
    ),
    _Alert(
        "ConsulPromWorkersDie",
        "Told by Gunicorn's master, where our hooks run: also of workers that never lived to see a scrape.",
        "sum without (reason, signal, master) "
        '(increase(gunicorn_worker_exits_total{JOB, reason=~"boot|error|signal|timeout"}[10m])) >= 5',
        "0m",
        "critical",
        "{{ $value }} workers of SERVICE at {{ $labels.instance }} died within 10 minutes",
        "gunicorn_worker_exits_total has the reasons and signals; SIGKILL is mostly the kernel, out of memory.",
    ),
    _Alert(
        "ConsulPromWorkersMissing",
        "Told by Gunicorn's master, where our hooks run. A worker that is recycled is replaced within seconds.",
        "sum without (master) (gunicorn_workers{JOB}) < sum without (master) (gunicorn_workers_wanted{JOB})",
        "2m",
        "critical",
        "SERVICE at {{ $labels.instance }} has {{ $value }} workers, fewer than it shall have",
        "Gunicorn's log says why no worker starts.",
    ),
    _Alert(
        "ConsulPromInstanceClaimedTwice",
        "A successor starts later than its predecessor: a start that goes back is two processes under one name, whose"
        " counters Prometheus mixes without a word.",
        "resets(process_start_time_seconds{JOB}[10m]) > 1",
        "0m",
        "critical",
        "Two processes are {{ $labels.instance }} of SERVICE",
        "Two hosts have one name: set CONSUL_PROM_HOST on one of them. consul-prom doctor names both.",
    ),
    _Alert(
        "ConsulPromNeverScraped",
        "Found in Consul, and no target: dropped by a relabelling, or over a limit. Prometheus has to scrape itself;"
        " the page of Gunicorn's master counts on both sides.",
        'sum(prometheus_sd_discovered_targets{name="scrape", config="CONSUL_SERVICE"}) '
        "> (count(up{JOB}) or vector(0)) unless on () resets(process_start_time_seconds{JOB}[10m]) > 1",
        "5m",
        "warning",
        "{{ $value }} targets of SERVICE are registered, and Prometheus scrapes fewer",
        "Compare Prometheus' pages of targets and of service discovery: dropped targets are in the second.",
    ),
    _Alert(
        "ConsulPromNotRegistered",
        "Scraped still: Prometheus keeps its targets while Consul cannot be asked. A restart of Prometheus loses it.",
        "consul_prom_registered{JOB} == 0",
        "5m",
        "warning",
        "{{ $labels.instance }} of SERVICE cannot register",
        "The worker's log and the page at its port say why; consul-prom doctor on its host finds it.",
    ),
    _Alert(
        "ConsulPromEventLoopLag",
        "Each request of the worker waits for so long. One slow callback is none: it has to stay.",
        "consul_prom_event_loop_lag_seconds{JOB} > 0.5",
        "2m",
        "warning",
        "The event loop of {{ $labels.instance }} of SERVICE is {{ $value }} s late",
        "Something blocks it: python -X dev, or py-spy dump --pid, says what.",
    ),
    _Alert(
        "ConsulPromSlowScrape",
        "Prometheus gives up after scrape_timeout, 10 s unless set, and the worker's own thread is busy for as long.",
        "scrape_duration_seconds{JOB} > 3",
        "5m",
        "warning",
        "A scrape of {{ $labels.instance }} of SERVICE takes {{ $value }} s",
        "A collector of the application is slow, or a label has too many values: topk(10, count by (__name__)"
        " ({job=...})).",
    ),
)


def rules(settings: Settings) -> str:
    """Two groups in YAML: recording rules and alerts of the service.

    Raises:
        SettingsError: no service is set.
    """
    check_named(settings)
    return "\n".join((*_records(settings), *_alerts(settings), ""))


def _records(settings: Settings) -> Iterator[str]:
    yield "groups:"
    yield f"  - name: consul-prom-{settings.service}-records"
    yield "    # First rate(), then sum(): a sum of counters falls when a worker is replaced, and looks like a reset."
    yield "    rules:"
    for record in RECORDS:
        yield f"      - record: {record.name}"
        yield f"        expr: {_filled(record.expression, settings)}"


def _alerts(settings: Settings) -> Iterator[str]:
    yield f"  - name: consul-prom-{settings.service}-alerts"
    yield "    rules:"
    for alert in ALERTS:
        yield f"      # {alert.why}"
        yield f"      - alert: {alert.name}"
        yield f"        expr: {_filled(alert.expression, settings)}"
        yield f"        for: {alert.hold}"
        yield f"        labels: {{severity: {alert.severity}}}"
        yield "        annotations:"
        yield f"          summary: {json.dumps(_filled(alert.summary, settings))}"
        yield f"          description: {json.dumps(_filled(alert.cure, settings))}"


def _filled(text: str, settings: Settings) -> str:
    """JOB is all targets of the service, WORKERS all but the page of Gunicorn's master."""
    job = f'job="{settings.service}"'
    text = text.replace("WORKERS", f'{job}, instance!~".+:master"').replace("JOB", job)
    return text.replace("CONSUL_SERVICE", settings.consul_service).replace("SERVICE", settings.service)
