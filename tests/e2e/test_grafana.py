"""The dashboard: a model that Grafana imports, and not one panel without data."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from consul_prom.generate import grafana, rules, scrape_config
from consul_prom.settings.settings import Settings, load
from tests.services.consul import Consul
from tests.services.gunicorn import HOOKS, Gunicorn
from tests.services.program import own_address
from tests.services.prometheus import HASTY, Prometheus
from tests.services.waiting import wait_until

MakeSettings = Callable[..., Settings]


@pytest.fixture
def board(settings: MakeSettings) -> dict[str, Any]:
    return dict(json.loads(grafana.grafana(settings())))


def queries(board: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and PromQL of every target, with the variables filled in as Grafana does."""
    chosen = next(variable for variable in board["templating"]["list"] if variable["name"] == "instance")
    filled = {"$job": "shop", "$instance": chosen["allValue"], "$__rate_interval": "30s"}
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for variable, value in filled.items():
                query = query.replace(variable, value)
            assert "$" not in query
            yield panel["title"], query


def test_model(board: dict[str, Any]) -> None:
    """What Grafana needs of a dashboard is there, and nothing is named twice."""
    assert board["schemaVersion"] >= 36
    assert (board["uid"], bool(board["title"])) == ("consul-prom", True)
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] in {"row", "stat", "timeseries"}
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_places(board: dict[str, Any]) -> None:
    """Panels lie side by side, within the width, none over another, and each row is full."""
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        cells = set(itertools.product(range(x, x + width), range(y, y + height)))
        assert x + width <= grafana.WIDTH
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len(taken) == grafana.WIDTH * (max(y for _, y in taken) + 1)


def test_variables(board: dict[str, Any]) -> None:
    """Source, service and worker are chosen above; the service that is set is what is shown at first."""
    found = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert list(found) == ["datasource", "job", "instance"]
    assert found["job"]["current"]["value"] == "shop"
    assert found["instance"]["multi"]
    unset = json.loads(grafana.grafana(load({}, environ={})))
    assert "current" not in unset["templating"]["list"][1]


def test_every_panel_has_data(board: dict[str, Any]) -> None:
    """A real Prometheus that scrapes a real application without a fault answers every query of panels and rules."""
    with Consul() as consul, hooked(consul) as shop:
        settings = load({"service": "shop", "consul_http_addr": consul.url}, environ={})
        config, address = yaml.safe_load(scrape_config.prometheus(settings)), own_address()
        itself = {"job_name": "prometheus", "static_configs": [{"targets": [f"{address}:9090"]}]}
        with Prometheus([*config["scrape_configs"], itself], address=address, flags=HASTY) as prometheus:

            def lacking() -> list[str]:
                shop.get("/fire")
                return [title for title, query in queries(board) if not _has_data(prometheus, query)]

            wait_until(lambda: not lacking(), within=90, what="data in every panel", every=0.5)
            assert lacking() == []
            for record in rules.RECORDS:
                assert _has_data(prometheus, rules._filled(record.expression, settings))
            assert prometheus.query('consul_prom_worker_info{job="shop"}')
            assert prometheus.query_value(dict(queries(board))["Workers up"]) == 2
            assert prometheus.query_value(rules._filled("count(up{JOB} == 1)", settings)) == 3, "the master's too"
            # What alerts compare is there, under the names that they give.
            (alert,) = (alert for alert in rules.ALERTS if alert.name == "ConsulPromNeverScraped")
            assert prometheus.query_value(rules._filled(alert.expression.partition(" > ")[0], settings)) == 3
            for alert in rules.ALERTS:
                assert prometheus.query(rules._filled(alert.expression, settings)) == []
                for name in re.findall("gunicorn_[a-z_]+", alert.expression):
                    assert prometheus.query(name)


def hooked(consul: Consul) -> Gunicorn:
    """The application under our hooks, so that the master tells too."""
    settings = {"CONSUL_HTTP_ADDR": consul.url, "CONSUL_PROM_SERVICE": "shop"}
    return Gunicorn(workers=2, settings=settings, options=HOOKS)


def _has_data(prometheus: Prometheus, query: str) -> bool:
    values = [float(sample["value"][1]) for sample in prometheus.query(query)]
    return any(math.isfinite(value) for value in values)
