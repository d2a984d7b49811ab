"""Debian's Pushgateway, a group for each process."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.headtohead.contender import Helper, Instruments, Place, Pusher, static


class _Pushgateway(Pusher):
    title = "Pushgateway"
    how = "each worker pushes its page as often as others are scraped, a group by process"

    def helpers(self, place: Place) -> Sequence[Helper]:
        options = [f"--web.listen-address={place.address}:9091", "--persistence.file=", "--log.level=error"]
        return [Helper("prometheus-pushgateway", options, 9091, "/-/ready")]

    def environment(self, place: Place) -> Mapping[str, str]:
        return {"GATEWAY": f"{place.address}:9091"}

    def prometheus(self, place: Place) -> Mapping[str, Any]:
        return {"scrape_configs": [{**static("shop", f"{place.address}:9091"), "honor_labels": True}]}

    def instruments(self, place: Place) -> Instruments:
        from tests.bench.headtohead import client

        return client.instruments(place)

    def push(self) -> None:
        from prometheus_client import REGISTRY, push_to_gateway

        push_to_gateway(
            os.environ["GATEWAY"], job="shop", registry=REGISTRY, grouping_key={"instance": str(os.getpid())}
        )


CONTENDER = _Pushgateway()
