"""gunicorn-prometheus-exporter with Redis instead of files."""

from collections.abc import Mapping, Sequence

from tests.bench.headtohead.contender import Helper, Place
from tests.bench.headtohead.contenders.exporter_files import REQUIREMENTS, Exporter


class _ExporterRedis(Exporter):
    title = "gunicorn-prometheus-exporter, Redis"
    how = "the same, but each increment is a call to Redis"
    requirements = (*REQUIREMENTS, "redis==8.1.0")
    ready_hook = "redis_when_ready"

    def helpers(self, place: Place) -> Sequence[Helper]:
        return [Helper("redis-server", ["--bind", place.address, "--save", "", "--loglevel", "warning"], 6379)]

    def environment(self, place: Place) -> Mapping[str, str]:
        own = {"REDIS_ENABLED": "true", "REDIS_HOST": place.address, "REDIS_PORT": "6379"}
        return {**super().environment(place), **own}


CONTENDER = _ExporterRedis()
