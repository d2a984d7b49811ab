"""What a worker does for the others of its service: for its dead, for vacant slots, and for Gunicorn's masters."""

import logging

from prometheus_client import CollectorRegistry

from consul_prom.adoption import Adoption
from consul_prom.caretaker import Caretaker
from consul_prom.client import AgentClient
from consul_prom.guest import Guest
from consul_prom.settings import Settings
from consul_prom.site import Site
from consul_prom.slots import Slot
from consul_prom.tally import Masters

log = logging.getLogger(__name__)


async def take_care(settings: Settings, client: AgentClient, site: Site, *, start_took: float) -> None:
    """For ever; whose pages have to be served, are guests of *site*. *start_took*: seconds that a worker's start takes.

    Raises nothing.
    """
    masters = Masters(settings.dir, settings.service)
    patience = 0.8 * settings.stop_timeout

    async def receive(slot: Slot) -> Guest:
        return await site.receive(client, slot, masters.registry())

    async def adopt(slot: Slot, page: CollectorRegistry, port: int) -> Guest:
        return await site.receive(client, slot, page, port=port, adopted=True)

    adoption = Adoption(
        settings.dir,
        settings.service,
        host=settings.host,
        retain=settings.retain,
        patience=patience,
        serve=adopt,
        complete=masters.complete,
        slowest_start=start_took,
    )
    caretaker = Caretaker(
        client,
        directory=settings.dir,
        service=settings.service,
        host=settings.host,
        masters=masters.living,
        receive=receive,
        adoption=adoption if settings.ledger and settings.retain else None,
        patience=patience,
    )
    try:
        await caretaker.run()
    except Exception:
        log.exception("consul-prom no longer looks after dead workers: an error that it did not expect")
