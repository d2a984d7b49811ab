"""All that a running Gunicorn tells and has written, for those who look for what must not be there."""

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.services.consul import Consul
from tests.services.gunicorn import Gunicorn


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


def told(consul: Consul, shop: Gunicorn) -> Iterator[tuple[str, str]]:
    """All that can be read of a running shop, and where."""
    for pid in {shop.pid, *shop.workers()}:
        yield f"process list, {pid}", Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    entries = consul.call("/v1/agent/services")[1]
    yield "agent", json.dumps(entries)
    yield "agent's checks", json.dumps(consul.call("/v1/agent/checks")[1])
    yield "catalogue", json.dumps(consul.call("/v1/health/service/shop-metrics")[1])
    for entry in entries.values():
        for path in ("/", "/metrics", "/-/healthy"):
            yield f"{path} of {entry['ID']}", fetch(f"http://{entry['Address']}:{entry['Port']}{path}")


def written(*directories: Path, but: Path | None = None) -> Iterator[tuple[str, str]]:
    """All files in *directories*, logs among them."""
    for directory in directories:
        for folder, _, names in os.walk(directory):
            for file in (Path(folder, name) for name in names):
                if file != but and file.is_file():
                    yield str(file), file.read_text(encoding="utf-8", errors="replace")
