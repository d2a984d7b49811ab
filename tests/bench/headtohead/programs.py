"""The programs of the contenders, and the load generator: built from source as Consul is, or installed by Debian."""

import shutil
from pathlib import Path
from typing import Final

from tests.bench.headtohead.contender import Unavailable
from tests.services.binaries import cache_folder, find
from tests.services.building import Recipe, ServiceUnavailable, build

HERE: Final = Path(__file__).parent / "programs"
HEY: Final = Recipe(
    folder=HERE / "hey", packages=("github.com/rakyll/hey",), version="0.1.5", flags=("-ldflags=-s -w",), minutes=1
)
STATSD_EXPORTER: Final = Recipe(
    folder=HERE / "statsd_exporter",
    packages=("github.com/prometheus/statsd_exporter",),
    version="0.30.0",
    flags=("-ldflags=-s -w",),
    minutes=1,
)
BUILT: Final = {"hey": HEY, "statsd_exporter": STATSD_EXPORTER}
SERVICES: Final = {"consul", "prometheus"}


def program(name: str) -> Path:
    """Its path.

    Raises:
        Unavailable: it is not there, and cannot be built.
    """
    try:
        if name in SERVICES:
            return find(name)
        if name in BUILT:
            return _built(name, BUILT[name])
    except ServiceUnavailable as error:
        raise Unavailable(str(error)) from error
    if found := shutil.which(name):
        return Path(found)
    raise Unavailable(f"{name} is not in PATH; Debian's package {name} has it")


def _built(name: str, recipe: Recipe) -> Path:
    folder = cache_folder() / recipe.key
    if not (folder / name).exists():
        build(recipe, into=folder)
    return folder / name
