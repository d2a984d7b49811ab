"""The rules: promtool reads them, each alert fires when it should, and stays silent through everyday life."""

from collections.abc import Callable, Iterable, Mapping

import pytest
import yaml

from consul_prom.errors import SettingsError
from consul_prom.generate import rules
from consul_prom.generate.rules import ALERTS
from consul_prom.settings.settings import Settings, load
from tests.services.prometheus import PromtoolRefusal, promtool_check_rules, promtool_test_rules

MakeSettings = Callable[..., Settings]
Series = Mapping[str, str]
LONG = 160  # samples, 15 s apart: 40 minutes
HALF = LONG // 2


@pytest.fixture
def text(settings: MakeSettings) -> str:
    return rules.rules(settings())


def series(values: Series) -> list[dict[str, str]]:
    return [{"series": name, "values": value} for name, value in values.items()]


def worker(slot: int, **values: str) -> dict[str, str]:
    """The series of one worker, in promtool's notation; *values* are those that are not what a calm life has."""
    calm = {
        "up": f"1x{LONG}",
        "process_start_time_seconds": f"1000x{LONG}",
        "consul_prom_registered": f"1x{LONG}",
        "consul_prom_event_loop_lag_seconds": f"0.002x{LONG}",
        "scrape_duration_seconds": f"0.01x{LONG}",
        "http_requests_total": f"0+30x{LONG}",
    }
    labels = f'job="shop", instance="web-1:{slot}"'
    return {f"{name}{{{labels}}}": value for name, value in {**calm, **values}.items()}


def adopted(up: str, requests: str, *, newborn: bool = False) -> dict[str, str]:
    """A worker that ends after half of the time: for some scrapes a sibling serves what is no process' own."""
    later = f"_x9 {{}}x{HALF}" if newborn else ""
    gone = {"consul_prom_registered": 1, "consul_prom_event_loop_lag_seconds": 0.002}
    lives = {name: f"{value}x{HALF} stale {later.format(value)}" for name, value in gone.items()}
    start = f"1000x{HALF} stale {later.format(2000)}"
    return {**lives, "up": up, "http_requests_total": requests, "process_start_time_seconds": start}


def host(discovered: str, workers: str, wanted: str, *, up: str = f"1x{LONG}") -> dict[str, str]:
    """What Prometheus tells of itself, and Gunicorn's master, whose page is a target more."""
    target = 'job="shop", instance="web-1:master"'
    master = f'{target}, master="0"'
    return {
        'prometheus_sd_discovered_targets{job="prometheus", name="scrape", config="shop-metrics"}': discovered,
        f"up{{{target}}}": up,
        f"scrape_duration_seconds{{{target}}}": f"0.01x{LONG}",
        f"gunicorn_workers{{{master}}}": workers,
        f"gunicorn_workers_wanted{{{master}}}": wanted,
        f'gunicorn_worker_exits_total{{{master}, reason="stop", signal=""}}': f"0x{HALF} 40x{HALF}",
        f'gunicorn_worker_exits_total{{{master}, reason="max_requests", signal=""}}': f"0+1x{LONG}",
    }


def fires(text: str, alert: str, minute: int, values: Series) -> bool:
    """Whether the alert is firing at that minute, for anything."""
    silent = {"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": []}
    refused = ""
    try:
        promtool_test_rules(text, {"interval": "15s", "input_series": series(values), "alert_rule_test": [silent]})
    except PromtoolRefusal as refusal:
        refused = str(refusal)
    assert not refused or f"alertname: {alert}" in refused, refused
    return bool(refused)


def assert_silent(text: str, values: Series, but: Iterable[str] = ()) -> None:
    """No alert fires in any minute."""
    cases = [
        {"eval_time": f"{minute}m", "alertname": alert.name, "exp_alerts": []}
        for alert in ALERTS
        if alert.name not in but
        for minute in range(LONG // 4)
    ]
    promtool_test_rules(text, {"interval": "15s", "input_series": series(values), "alert_rule_test": cases})


def test_promtool_reads_them(text: str) -> None:
    """Prometheus' own tool takes them, and finds nothing to complain of."""
    promtool_check_rules(text)


def test_of_any_service(settings: MakeSettings) -> None:
    """Names of the service and of what is registered are where they belong; two services' rules do not collide."""
    text = rules.rules(settings(service="till", consul_service="till-workers"))
    promtool_check_rules(text)
    assert 'job="till"' in text
    assert 'config="till-workers"' in text
    assert "shop" not in text
    assert [group["name"] for group in yaml.safe_load(text)["groups"]] == [
        "consul-prom-till-records",
        "consul-prom-till-alerts",
    ]


def test_no_service() -> None:
    """Without a service there are none."""
    with pytest.raises(SettingsError, match="no service name"):
        rules.rules(load({}, environ={}))


def test_alerts_help(text: str) -> None:
    """Every alert says what is the matter and what to do, and carries a severity."""
    alerts = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(alerts) == len(ALERTS)
    for alert in alerts:
        assert {"summary", "description"} == set(alert["annotations"])
        assert "shop" in alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in {"warning", "critical"}


def test_records(text: str) -> None:
    """What is recorded is the sum over the workers; one that began anew counts on."""
    requests = {
        f'http_requests_total{{job="shop", instance="web-1:{slot}", method="GET", route="/", status="200"}}': values
        for slot, values in ((0, "0+15x40"), (1, "0+15x20 15+15x20"))
    }
    bucket = 'http_request_duration_seconds_bucket{job="shop", instance="web-1:0", method="GET", route="/", le="0.1"}'
    name = "job_method_route_status:http_requests:rate5m"
    expected = {"labels": f'{name}{{job="shop", method="GET", route="/", status="200"}}', "value": 2}
    bucket_name = "job_method_route_le:http_request_duration_seconds_bucket:rate5m"
    in_bucket = {"labels": f'{bucket_name}{{job="shop", method="GET", route="/", le="0.1"}}', "value": 1}
    infos = {
        f'consul_prom_worker_info{{job="shop", instance="web-1:{slot}", slot="{slot}"}}': "1x40" for slot in (0, 1)
    }
    workers = {"labels": 'job:workers:count{job="shop"}', "value": 2}
    case = {
        "interval": "15s",
        "input_series": series({**requests, bucket: "0+15x40", **infos}),
        "promql_expr_test": [
            {"expr": name, "eval_time": "8m", "exp_samples": [expected]},
            {"expr": bucket_name, "eval_time": "5m", "exp_samples": [in_bucket]},
            {"expr": "job:workers:count", "eval_time": "5m", "exp_samples": [workers]},
        ],
    }
    promtool_test_rules(text, case)


class TestEverydayLife:
    """Nobody gets up for these."""

    def test_calm(self, text: str) -> None:
        """Nothing happens."""
        assert_silent(text, {**worker(0), **worker(1), **host(f"3x{LONG}", f"2x{LONG}", f"2x{LONG}")})

    def test_deploy(self, text: str) -> None:
        """All workers are replaced, three times in ten minutes; each is down for two scrapes."""
        starts = f"1000x{HALF - 10} 2000x10 3000x10 4000x{HALF}"
        ups = f"1x{HALF - 12} 0 0 1x8 0 0 1x8 0 0 1x{HALF}"
        registered = f"1x{HALF - 12} 0 1x9 0 1x9 0 1x{HALF}"
        lives = {"up": ups, "process_start_time_seconds": starts, "consul_prom_registered": registered}
        discovered = f"3x{HALF - 12} 0 2 3x{HALF}"
        # With the last worker the master's page goes too, and comes when the next one's caretaker has it.
        alive, wanted = f"2x{HALF - 12} stale 1 2x{HALF}", f"2x{HALF - 12} stale 2 2x{HALF}"
        master = host(discovered, alive, wanted, up=f"1x{HALF - 12} stale 0 1x{HALF}")
        assert_silent(text, {**worker(0, **lives), **worker(1, **lives), **master})

    def test_restart(self, text: str) -> None:
        """A whole server is stopped, and started a minute later: all that there was is gone for so long."""
        gap = f"1x{HALF} stale _x4 1x{HALF}"
        lives = {"up": gap, "process_start_time_seconds": f"1000x{HALF} stale _x4 2000x{HALF}"}
        workers, discovered = f"1x{HALF} stale _x4 1x{HALF}", f"2x{HALF} 0x4 2x{HALF}"
        assert_silent(text, {**worker(0, **lives), **host(discovered, workers, workers, up=gap)})

    def test_reload(self, text: str) -> None:
        """New workers come in other slots, and the old ones go."""
        goes = dict.fromkeys(("up", "consul_prom_registered"), f"1x{HALF} 0 stale")
        goes["process_start_time_seconds"] = f"1000x{HALF} stale"
        comes = dict.fromkeys(("up", "consul_prom_registered"), f"_x{HALF} 1x{HALF}")
        comes["process_start_time_seconds"] = f"_x{HALF} 2000x{HALF}"
        discovered = f"2x{HALF - 1} 3 3 2x{HALF}"
        alive, wanted = f"1x{HALF - 1} 2 2 1x{HALF}", f"1x{LONG}"
        # The caretaker was the old one: its page moves to the new one's port.
        master = host(discovered, alive, wanted, up=f"1x{HALF} 0 0 1x{HALF}")
        assert_silent(text, {**worker(0, **goes), **worker(1, **comes), **master})

    def test_scale_down(self, text: str) -> None:
        """A worker ends and is not replaced; its last page is served on for a while, and then is not."""
        goes = adopted(f"1x{HALF} 0 1x8 0 stale", f"0+30x{HALF} _ {30 * HALF}x8 stale")
        wanted, alive = f"2x{HALF} 1x{HALF}", f"2x{HALF + 2} 1x{HALF}"
        assert_silent(text, {**worker(0), **worker(1, **goes), **host(f"3x{HALF + 9} 2x{HALF}", alive, wanted)})

    def test_scale_up(self, text: str) -> None:
        """More workers are wanted than there are, until they have started."""
        comes = dict.fromkeys(("up", "consul_prom_registered"), f"_x{HALF + 4} 1x{HALF}")
        comes["process_start_time_seconds"] = f"_x{HALF + 4} 2000x{HALF}"
        alive, wanted = f"1x{HALF + 4} 2x{HALF}", f"1x{HALF} 2x{HALF}"
        assert_silent(text, {**worker(0), **worker(1, **comes), **host(f"2x{HALF + 4} 3x{HALF}", alive, wanted)})

    def test_adoption(self, text: str) -> None:
        """The page of a slot without a worker is served on, and then a newborn has the slot and counts on."""
        up, requests = f"1x{HALF} 0 1x8 0 1x{HALF}", f"0+30x{HALF} _ {30 * HALF}x8 _ {30 * HALF}+30x{HALF}"
        lives = adopted(up, requests, newborn=True)
        alive = f"2x{HALF} 1x10 2x{HALF}"
        assert_silent(text, {**worker(0), **worker(1, **lives), **host(f"3x{LONG}", alive, alive)})

    def test_one_slow_callback(self, text: str) -> None:
        """A hiccup of a minute is none."""
        hiccup = {
            "consul_prom_event_loop_lag_seconds": f"0.01x{HALF} 5x4 0.01x{HALF}",
            "scrape_duration_seconds": f"0.01x{HALF} 9x8 0.01x{HALF}",
            "consul_prom_registered": f"1x{HALF} 0x12 1x{HALF}",
        }
        assert_silent(text, worker(0, **hiccup))


FIRING: Mapping[str, Series] = {
    "ConsulPromWorkerDown": worker(1) | worker(0, up=f"1x{HALF} 0x{HALF}"),
    "ConsulPromNoWorker": host(f"2x{HALF} 1x{HALF}", f"1x{LONG}", f"1x{LONG}")
    | {'up{job="shop", instance="web-1:0"}': f"1x{HALF} stale"},
    "ConsulPromEntryStays": worker(1) | worker(0, up=f"1x{HALF} 0x{HALF}"),
    "ConsulPromCrashLoop": worker(0, process_start_time_seconds=f"1000x{HALF} 1000+60x{HALF}"),
    "ConsulPromWorkersDie": worker(0)
    | {
        f'gunicorn_worker_exits_total{{job="shop", instance="web-1:master", master="0", {why}}}': f"0x{HALF} 0+1x{HALF}"
        for why in ('reason="signal", signal="SIGKILL"', 'reason="boot", signal=""')
    },
    "ConsulPromWorkersMissing": worker(0) | host(f"2x{LONG}", f"2x{HALF} 1x{HALF}", f"2x{LONG}"),
    "ConsulPromInstanceClaimedTwice": worker(
        0, process_start_time_seconds=f"1000x{HALF} " + " ".join(["2000 1000"] * (HALF // 2))
    ),
    "ConsulPromNeverScraped": {**worker(0), **host(f"2x{HALF} 3x{HALF}", f"1x{LONG}", f"1x{LONG}")},
    "ConsulPromNotRegistered": worker(0, consul_prom_registered=f"1x{HALF} 0x{HALF}"),
    "ConsulPromEventLoopLag": worker(0, consul_prom_event_loop_lag_seconds=f"0.01x{HALF} 2x{HALF}"),
    "ConsulPromSlowScrape": worker(0, scrape_duration_seconds=f"0.01x{HALF} 4x{HALF}"),
}
TOGETHER = {"ConsulPromEntryStays": {"ConsulPromWorkerDown"}, "ConsulPromWorkerDown": {"ConsulPromEntryStays"}}


class TestFiring:
    """What somebody gets up for."""

    def test_every_alert_has_its_case(self) -> None:
        """No alert is without a case that makes it fire."""
        assert set(FIRING) == {alert.name for alert in ALERTS}

    @pytest.mark.parametrize("alert", FIRING)
    def test_fires(self, text: str, alert: str) -> None:
        """It is silent before, it fires while it is so, and no other alert fires along."""
        values = FIRING[alert]
        assert not fires(text, alert, 18, values)
        assert fires(text, alert, 38, values)
        assert_silent(text, values, but={alert} | TOGETHER.get(alert, set()))

    def test_none_scraped_at_all(self, text: str) -> None:
        """Workers that are registered are missed also where not one of them is scraped."""
        assert fires(text, "ConsulPromNeverScraped", 20, host(f"3x{LONG}", f"2x{LONG}", f"2x{LONG}", up=f"_x{LONG}"))

    def test_what_is_said(self, text: str) -> None:
        """The words name the worker and the service."""
        alert = {
            "exp_labels": {"severity": "warning", "job": "shop", "instance": "web-1:0"},
            "exp_annotations": {
                "summary": "The event loop of web-1:0 of shop is 2 s late",
                "description": "Something blocks it: python -X dev, or py-spy dump --pid, says what.",
            },
        }
        case = {"eval_time": "38m", "alertname": "ConsulPromEventLoopLag", "exp_alerts": [alert]}
        values = series(FIRING["ConsulPromEventLoopLag"])
        promtool_test_rules(text, {"interval": "15s", "input_series": values, "alert_rule_test": [case]})
