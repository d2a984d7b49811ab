"""Gunicorn's hooks: ``gunicorn -c python:consul_prom.gunicorn app:app`` serves every worker, whatever its class.

``./gunicorn.conf.py``, which Gunicorn leaves out for that, is read too. The other way round, the last line of a
gunicorn.conf.py may be ``consul_prom.gunicorn.install(globals())``. Settings come from the environment. Where the
application is set up in code as well, the two are one worker.
"""

import gc
import importlib
import importlib.util
import logging
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, MutableMapping
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Final
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY

from consul_prom.errors import SettingsError
from consul_prom.gunicorn.master import Master
from consul_prom.gunicorn.stats import LOG, LogLines
from consul_prom.process import exit_hooks
from consul_prom.process.identity import process_identity
from consul_prom.settings.settings import load

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter
    from gunicorn.workers.base import Worker as GunicornWorker

    from consul_prom.settings.settings import Arguments
    from consul_prom.worker import Worker

log = logging.getLogger(__name__)

CONFIG: Final = "gunicorn.conf.py"
QUICK: Final = 0.7
"""Seconds of a worker's stop, of the two that Gunicorn gives it when it is told a second time to end.

The master may spend half a second more after its last worker.
"""
MOMENT: Final = 0.4
"""Of the one or so after a time-out."""


class _Ours:
    """What belongs to a master, and to a worker of Gunicorn's."""

    masters: ClassVar[WeakKeyDictionary["Arbiter", Master]] = WeakKeyDictionary()
    workers: ClassVar[WeakKeyDictionary["GunicornWorker", "Worker"]] = WeakKeyDictionary()


def on_starting(server: "Arbiter") -> None:
    """In the master, before any worker: what all of them would import is imported once, unless gevent must be first."""
    if "gevent" not in server.cfg.worker_class_str:
        _preload()
    _look_for_others(server.cfg)
    _Ours.masters[server] = Master(uid=server.cfg.uid, gid=server.cfg.gid)


def _master(server: "Arbiter") -> Master | None:
    """What belongs to the master, in the master: each process forked from it has a copy, and may run its hooks."""
    master = _Ours.masters.get(server)
    return master if master and master.mine else None


def nworkers_changed(server: "Arbiter", new_value: int, _old_value: int | None) -> None:
    if master := _master(server):
        master.workers(wanted=new_value, alive=len(server.WORKERS))


def pre_fork(server: "Arbiter", _worker: "GunicornWorker") -> None:
    if master := _master(server):
        master.workers(wanted=server.num_workers, alive=len(server.WORKERS) + 1)


def post_worker_init(worker: "GunicornWorker") -> None:
    """In the worker, once its application is loaded.

    Raises:
        ConsulPromError: only where REQUIRED; Gunicorn then takes the worker's start for failed.
    """
    from consul_prom.worker import Worker

    if not _is_ours(worker.cfg.on_starting):
        _look_for_others(worker.cfg)  # the master could not
    ours = _Ours.workers[worker] = Worker(**_bounds(worker.cfg))
    if ours.nameless:
        return  # the application may name itself; the master has said it
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_DFL:  # uvicorn's class: it dies of the signal once it has shut down
            signal.signal(number, _exit)
    ours.start(keeps=False)
    if ours.served:
        try:
            logging.getLogger(LOG).addFilter(LogLines(REGISTRY))
        except ValueError as error:
            log.warning("the lines of Gunicorn's log are not counted: %s", error)


def _bounds(config: Any) -> "Arguments":
    """A stop takes a third at most of what Gunicorn gives a worker: the rest is the application's."""
    try:
        longest = load({}).stop_timeout
    except SettingsError:
        return {}  # the worker says it
    return {"stop_timeout": min(longest, *(each / 3 for each in (config.graceful_timeout, config.timeout) if each))}


def worker_int(worker: "GunicornWorker") -> None:
    """In the worker that shall end at once."""
    if ours := _Ours.workers.get(worker):
        ours.hurry(QUICK)


def worker_abort(worker: "GunicornWorker") -> None:
    """In the worker that has timed out, and will be killed in a moment."""
    if ours := _Ours.workers.get(worker):
        ours.hurry(MOMENT)


def _exit(number: int, _frame: object) -> None:
    exit_hooks.die_at_exit(number)
    raise SystemExit(0)


def worker_exit(server: "Arbiter", worker: "GunicornWorker") -> None:
    """In the worker, at its end; in the master too, for a worker that is found to be gone."""
    if worker.pid != os.getpid():
        child_exit(server, worker)
    elif ours := _Ours.workers.pop(worker, None):
        for number in (signal.SIGQUIT, signal.SIGINT):  # a loop that was closed took Gunicorn's handlers down
            if signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}:
                signal.signal(number, lambda *_: ours.hurry(QUICK))
        ours.stop(last=True)


def child_exit(server: "Arbiter", worker: "GunicornWorker") -> None:
    """In the master, after any end of a worker."""
    if master := _master(server):
        alive, wanted = len(server.WORKERS), server.num_workers
        short = bool(server.cfg.max_requests and server.LISTENERS) and alive < wanted
        master.workers(wanted=wanted, alive=alive)
        master.bury(worker.pid, timeout=worker.aborted, left=short)


def on_exit(server: "Arbiter") -> None:
    """In the master, after all workers were stopped; what had to be killed is not waited for by Gunicorn."""
    if master := _master(server):
        del _Ours.masters[server]
        master.stop(dying=lambda: any(map(process_identity, server.WORKERS)))


def _preload() -> None:
    """Import what a worker would."""
    importlib.import_module("consul_prom.worker.worker")
    importlib.import_module("consul_prom.consul.client").preload()
    gc.collect()
    gc.freeze()  # else each worker's collections, and its end above all, walk all objects and copy their pages


_OURS: Final = (
    *(on_starting, nworkers_changed, pre_fork, post_worker_init),
    *(worker_int, worker_abort, worker_exit, child_exit, on_exit),
)
_LAST: Final = {post_worker_init}
"""What the user's hook goes before: it may set the environment. Otherwise ours has been done when theirs begins."""


def install(namespace: MutableMapping[str, Any]) -> None:
    """Put the hooks into a configuration, *namespace*, together with those that are there already."""
    for ours in _OURS:
        namespace[ours.__name__] = _chained(ours, namespace.get(ours.__name__))


def _chained(ours: Callable[..., None], theirs: Any) -> Callable[..., None]:
    if theirs is None:
        return ours
    if _is_ours(theirs):
        return theirs  # type: ignore[no-any-return]
    hook: Callable[..., None] = pkgutil.resolve_name(theirs) if isinstance(theirs, str) else theirs

    @wraps(ours)
    def both(*arguments: Any) -> None:
        if ours in _LAST:
            hook(*arguments)
            ours(*arguments)
            return
        try:
            ours(*arguments)
        finally:  # Gunicorn's handler of a second signal raises SystemExit
            hook(*arguments)

    return both


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "__wrapped__", hook) in _OURS


def _look_for_others(config: Any) -> None:
    """Say which of our hooks were replaced after `install`, which nothing but this would tell."""
    replaced = [ours.__name__ for ours in _OURS if not _is_ours(getattr(config, ours.__name__))]
    if replaced:
        log.warning(
            "consul_prom.gunicorn.install(globals()) must be the last line of gunicorn.conf.py: %s replaced by it",
            ", ".join(replaced) + (" was" if len(replaced) == 1 else " were"),
        )


def _configuration(path: Path) -> dict[str, Any]:
    """What a configuration file sets, read as Gunicorn reads it."""
    spec = importlib.util.spec_from_file_location("__config__", path)
    assert spec  # noqa: S101  # it ends in .py
    assert spec.loader  # noqa: S101
    module = sys.modules["__config__"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


class _Config(ModuleType):
    """This module, of which Gunicorn asks ``vars`` at its start and at each reload."""

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        path = Path.cwd() / CONFIG
        names = dict(_configuration(path)) if path.exists() else {}
        install(names)
        return {**globals(), **names}


sys.modules[__name__].__class__ = _Config
