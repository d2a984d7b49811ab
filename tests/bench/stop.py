"""How much longer a Gunicorn takes to stop because of us: its own stop, and with the hooks, the agent well and hanging.

    python -m tests.bench.stop [rounds [model]]

Seconds from SIGQUIT to the master's end, which no loop that looks each second hides, interleaved: medians and the
worst, of which the other median is taken. What is added is bounded by STOP_TIMEOUT, 2 s, for the workers, and half a
second for their master; without us there is a worst too, which tells how busy the machine was.
"""

import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Final

from tests.services.consul import Consul
from tests.services.gunicorn import Gunicorn
from tests.services.waiting import wait_until

WORKERS: Final = 4
MODELS: Final = {
    "aiohttp": ("tests.e2e.plain:aiohttp_app", "aiohttp.GunicornWebWorker"),
    "sync": ("tests.e2e.plain:wsgi", "sync"),
}


def main(rounds: int, models: Sequence[str] = ()) -> None:
    """Print a row a model and state of the agent."""
    print(f"{'model':10}{'agent':10}{'without':>10}{'worst':>10}{'with':>10}{'worst':>10}{'added':>10}{'worst':>10}")
    with Consul() as consul:
        for model in models or MODELS:
            for hanging in (False, True):
                without, ours = zip(*(_round(consul, model, hanging=hanging) for _ in range(rounds)), strict=True)
                base, median = statistics.median(without), statistics.median(ours)
                row = (base, max(without), median, max(ours), median - base, max(ours) - base)
                state = "hangs" if hanging else "is well"
                print(f"{model:10}{state:10}" + "".join(f"{seconds:10.2f}" for seconds in row), flush=True)


def _round(consul: Consul, model: str, *, hanging: bool) -> tuple[float, float]:
    return _stop(consul, model, hanging=hanging, enabled=False), _stop(consul, model, hanging=hanging, enabled=True)


def _stop(consul: Consul, model: str, *, hanging: bool, enabled: bool) -> float:
    app, worker_class = MODELS[model]
    settings = {
        "CONSUL_PROM_SERVICE": "shop",
        "CONSUL_HTTP_ADDR": consul.url,
        "CONSUL_PROM_ADDRESS": consul.address,
        "CONSUL_PROM_DISABLED": str(not enabled).lower(),
    }
    options = ["-c=python:consul_prom.gunicorn", "--no-control-socket"]
    with Gunicorn(app, workers=WORKERS, worker_class=worker_class, settings=settings, options=options) as shop:
        entries = WORKERS + 1 if enabled else 0
        wait_until(lambda: len(consul.call("/v1/agent/services")[1]) == entries, within=60, what="the entries")
        wait_until(lambda: len(shop.workers()) == WORKERS, within=60, what="the workers")
        if hanging:
            consul.pause()
        begun = time.monotonic()
        os.kill(shop.pid, signal.SIGQUIT)
        wait_until(lambda: not shop.running, within=60, what="its end", every=0.005)
        seconds = time.monotonic() - begun
    if hanging:
        consul.resume()
        for key in consul.call("/v1/agent/services")[1]:
            consul.call(f"/v1/agent/service/deregister/{key}", method="PUT")
    return seconds


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9, sys.argv[2:])
