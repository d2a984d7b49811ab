"""The same application that counts nothing: what is measured beyond it is the price of metrics."""

from collections.abc import Mapping
from typing import Any

from tests.bench.headtohead.contender import Contender, Instruments, Place


class _Nothing(Contender):
    title = "no metrics"
    how = "the same server and application, to compare with"
    libraries = ()
    scraped = False

    def prometheus(self, place: Place) -> Mapping[str, Any]:
        return {"scrape_configs": []}

    def instruments(self, place: Place) -> Instruments:
        return Instruments([_nothing], [lambda _seconds: None], lambda _number: None)


def _nothing() -> None:
    pass


CONTENDER = _Nothing()
