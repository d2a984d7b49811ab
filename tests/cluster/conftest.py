"""A cluster for each test, and the shop of Gunicorn beside its client agent."""

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.shop import Shop


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def shop(cluster: Cluster) -> Iterator[Shop]:
    with Shop(cluster) as shop:
        shop.wait_settled(within=60)
        yield shop
