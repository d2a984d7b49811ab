"""What is measured: how many of what, and for how long."""

from dataclasses import dataclass
from typing import Final, NamedTuple

OURS: Final = "ours"
CONTROL: Final = "nothing"
"""Takes no part."""
CONTENDERS: Final = (
    OURS,
    "multiprocess",
    "async_server",
    "exporter_files",
    "exporter_redis",
    "statsd_client",
    "pushgateway",
    "opentelemetry_sdk",
    CONTROL,
)
"""Modules of `contenders`."""


class Cell(NamedTuple):
    """A server of so many workers with so many series each, and the intervals at which it is scraped, one by one."""

    workers: int
    series: int
    intervals: tuple[int, ...]
    births: bool = False
    """Whether the time to a worker's first sample is taken here."""
    details: bool = False
    """Whether throughput and memory are."""

    def __str__(self) -> str:
        return f"{self.workers} workers x {self.series:,} series"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Numbers and durations; seconds."""

    cells: tuple[Cell, ...]
    rate: float = 200
    """Requests a second."""
    window: float = 8
    """At an interval of 1 s; a longer one is watched for as long as itself."""
    parts: int = 4
    """Of the window, for the spread."""
    costs: int = 15
    """Rounds."""
    eager: bool = False
    """Whether Prometheus looks for new targets each second, where it would each 5 s: for a trial."""
    births: int = 3
    saturation: float = 4
    recycles: int = 1000
    recycling: float = 100
    """At most."""


FULL: Final = Plan(
    cells=(
        Cell(4, 200, (1,), births=True),
        Cell(4, 2000, (1, 15), details=True),
        Cell(16, 2000, (1,)),
        Cell(4, 20_000, (15,)),
    )
)
QUICK: Final = Plan(
    cells=(Cell(2, 200, (1,), births=True, details=True),),
    window=2,
    parts=2,
    eager=True,
    costs=3,
    births=1,
    saturation=1,
    recycles=20,
    recycling=5,
)
