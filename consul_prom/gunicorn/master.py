"""What runs in Gunicorn's master: it tallies what only the master knows, and buries the dead.

No thread, no socket that stays, no lock that stays: workers are forked from it. Nothing here raises.
"""

import encodings.ascii  # noqa: F401  # else first used as the workers' user, who may not read where modules are
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from consul_prom.errors import ConsulPromError, SettingsError
from consul_prom.gunicorn.reaper import MasterReaper
from consul_prom.gunicorn.stats import LOG, MasterStats
from consul_prom.logs import ThrottledLogger, first_time
from consul_prom.settings.settings import NO_SERVICE, Settings, load

log = logging.getLogger(__name__)


class Master:
    """One master process. *uid* and *gid* are its workers': what it does to their files, it does as they."""

    def __init__(self, *, uid: int, gid: int) -> None:
        self._pid = os.getpid()
        self._uid = uid
        self._gid = gid
        self._settings: Settings | None = None
        self._tally: MasterStats | None = None
        self._undertaker: MasterReaper | None = None
        self._log = ThrottledLogger(log)
        with self._unharmed():
            settings = load({}, uid=lambda: uid)
            if settings.disabled:
                return
            self._settings, self._undertaker = settings, MasterReaper(settings)
            if not settings.service and first_time(NO_SERVICE):
                log.warning(
                    "CONSUL_PROM_SERVICE is not set: workers are served only if the application passes service="
                )
            self._counts()

    @property
    def mine(self) -> bool:
        """False in a process that was forked from the master."""
        return self._pid == os.getpid()

    @property
    def _whole(self) -> bool:
        """Whether no part of it is missing: a directory that cannot be used costs it the tally."""
        return bool(self._settings and (self._tally or not self._settings.service))

    def workers(self, *, wanted: int, alive: int) -> None:
        with self._unharmed():
            if tally := self._counts():
                tally.workers(wanted=wanted, alive=alive)

    def _counts(self) -> MasterStats | None:
        """The tally of a service, begun as soon as the directory can be used; raises SlotError until then."""
        if self._tally is None and self._settings and self._settings.service:
            self._tally = MasterStats(self._settings.dir, self._settings.service, writing=self._as_worker)
            logging.getLogger(LOG).addFilter(self._tally)
        return self._tally

    def bury(self, pid: int, *, timeout: bool, left: bool) -> None:
        """A worker is gone: for its *timeout*, or it *left* of itself, or else."""
        with self._unharmed():
            if self._undertaker:
                with self._as_worker():
                    self._undertaker.bury(pid)
            if tally := self._counts():
                tally.exited(pid, timeout=timeout, left=left)

    def stop(self, *, dying: Callable[[], bool]) -> None:
        """The end; *dying*: whether workers that were killed are still there."""
        with self._unharmed():
            if self._tally:
                logging.getLogger(LOG).removeFilter(self._tally)
                self._tally.close()
            if self._undertaker:
                with self._as_worker():
                    self._undertaker.bury_all(dying=dying)

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        try:
            yield
        except SettingsError as error:
            if first_time(str(error)):
                log.error("consul-prom is off: %s", error)
        except (ConsulPromError, OSError) as error:
            self._log.failed(
                "consul-prom cannot do its part in Gunicorn's master: %s", error, reason=type(error).__name__
            )
        except Exception:
            log.exception("consul-prom did not expect this in Gunicorn's master")
        else:
            if self._whole:
                self._log.over("consul-prom does its part in Gunicorn's master again")

    @contextmanager
    def _as_worker(self) -> Iterator[None]:
        """Root would make files that its workers cannot open, and could be led astray in a directory of theirs."""
        if os.geteuid() == self._uid:
            yield
            return
        user, group = os.geteuid(), os.getegid()
        os.setegid(self._gid)
        try:
            os.seteuid(self._uid)
            try:
                yield
            finally:
                os.seteuid(user)
        finally:
            os.setegid(group)
