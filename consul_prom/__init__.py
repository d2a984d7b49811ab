"""Metrics of a multi-process Python server: every worker its own Prometheus target, found through Consul."""

import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consul_prom import asgi as asgi
    from consul_prom import gunicorn as gunicorn
    from consul_prom import wsgi as wsgi
    from consul_prom.aiohttp import setup as setup
    from consul_prom.discovery import ConsulDiscovery as ConsulDiscovery
    from consul_prom.errors import ConsulPromError as ConsulPromError
    from consul_prom.errors import SettingsError as SettingsError
    from consul_prom.worker import Worker as Worker
    from consul_prom.worker import running as running

__version__ = "0.1.0"

_HOMES = {
    "ConsulDiscovery": "consul_prom.discovery",
    "ConsulPromError": "consul_prom.errors",
    "SettingsError": "consul_prom.errors",
    "Worker": "consul_prom.worker",
    "running": "consul_prom.worker",
    "setup": "consul_prom.aiohttp",
}
_MODULES = {"asgi", "gunicorn", "wsgi"}
__all__ = [
    "ConsulDiscovery",
    "ConsulPromError",
    "SettingsError",
    "Worker",
    "__version__",
    "asgi",
    "gunicorn",
    "running",
    "setup",
    "wsgi",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a command must not pay for a worker's libraries."""
    if name in _MODULES:
        return import_module(f"consul_prom.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'consul_prom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, used or not yet, and not what their use has imported."""
    return __all__


def _before_fork() -> None:
    """Import the code that notes in a child what its parent counted. In the child an import would be too late."""
    if "prometheus_client" in sys.modules:
        with suppress(ImportError):  # a version that we do not know
            import_module("consul_prom.ledger.parent_counts")


os.register_at_fork(before=_before_fork)
