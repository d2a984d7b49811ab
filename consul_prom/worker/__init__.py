"""A running worker: its target, and the work of the leader for other workers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consul_prom.worker.worker import Worker as Worker
    from consul_prom.worker.worker import running as running


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: Gunicorn's master reads this folder's master page without aiohttp."""
    if name in {"Worker", "running"}:
        return getattr(import_module("consul_prom.worker.worker"), name)
    raise AttributeError(f"module 'consul_prom.worker' has no attribute {name!r}")
