"""consul-prom by its Gunicorn hooks, with a real Consul agent; Prometheus has the configuration that the CLI prints."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from tests.bench.headtohead.contender import Contender, Helper, Instruments, Place


class _Ours(Contender):
    title = "consul-prom"
    how = "each worker its own target, found through Consul"

    def helpers(self, place: Place) -> Sequence[Helper]:
        address = place.address
        options = [f"-bind={address}", f"-client={address}", f"-advertise={address}", "-log-level=warn"]
        return [Helper("consul", ["agent", "-dev", *options], 8500, "/v1/agent/self")]

    def environment(self, place: Place) -> Mapping[str, str]:
        return {
            "CONSUL_HTTP_ADDR": f"{place.address}:8500",
            "CONSUL_PROM_SERVICE": "shop",
            "CONSUL_PROM_DIR": str(place.directory / "slots"),
        }

    def prometheus(self, place: Place) -> Mapping[str, Any]:
        import yaml

        from consul_prom.generate import scrape_config
        from consul_prom.settings.settings import load

        settings = load({"service": "shop", "consul_http_addr": f"{place.address}:8500"}, environ={})
        configuration: Mapping[str, Any] = yaml.safe_load(scrape_config.prometheus(settings))
        return configuration

    def configure(self, place: Place, configuration: MutableMapping[str, Any]) -> None:
        import consul_prom.gunicorn

        consul_prom.gunicorn.install(configuration)

    def instruments(self, place: Place) -> Instruments:
        from tests.bench.headtohead import client

        return client.instruments(place)


CONTENDER = _Ours()
