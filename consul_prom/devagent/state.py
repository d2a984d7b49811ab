"""What an agent holds, and how it changes: services, their checks, and the indexes that blocking queries wait for.

Pure: no clock but the one that is given, nothing that waits, nothing that listens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from consul_prom.devagent import durations
from consul_prom.devagent.definition import CheckDefinition, ServiceDefinition
from consul_prom.devagent.errors import Refused


@dataclass(kw_only=True, slots=True, eq=False)
class Check:
    """A check since its last registration: each one starts the probing, and the reaper's patience, anew."""

    check_id: str
    name: str
    definition: CheckDefinition
    service: ServiceDefinition
    status: str
    output: str = ""
    critical_since: float | None = None
    """When a probe first failed; a check that never ran is critical, but not since any time."""


class State:
    """All of an agent's knowledge.

    `clock` gives seconds for durations, `epoch` the time of day in seconds, where the indexes start: an agent that
    lost everything still never gives a smaller index than before, which Prometheus would wait on for two minutes.
    `changed` is called after each change that somebody may be waiting for.
    """

    reap_after_at_least = 60.0
    """Consul's check_deregister_interval_min: a shorter DeregisterCriticalServiceAfter counts as this, in seconds."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        epoch: Callable[[], float] = time.time,
    ) -> None:
        self.changed: Callable[[], object] = lambda: None
        self.services: dict[str, ServiceDefinition] = {}
        self.checks: dict[str, Check] = {}
        self.catalog_index = self._index = int(epoch() * 1_000_000)
        self._vanished_index = self._index
        self._service_indexes: dict[str, int] = {}
        self._clock = clock

    def register(self, service: ServiceDefinition, *, replace_existing_checks: bool = False) -> None:
        """Adds the service, or takes the place of the one with its ID; known checks keep their status and output."""
        old = self.services.get(service.service_id)
        before = self._visible_checks(service.service_id)
        self.services[service.service_id] = service
        kept = {self._add_check(service, number, check) for number, check in enumerate(service.checks, start=1)}
        for check in self.checks_of(service.service_id):
            if check.check_id not in kept:
                if replace_existing_checks:
                    del self.checks[check.check_id]
                else:
                    check.service = service
        if old is not None and old.name != service.name:
            self._touch(old.name)
        if old is None or replace(old, checks=()) != replace(service, checks=()):
            self._touch(service.name)
            self.catalog_index = self._index
        elif before != self._visible_checks(service.service_id):
            self._touch(service.name)
        self.changed()

    def deregister(self, service_id: str) -> None:
        service = self.services.pop(service_id, None)
        if service is None:
            raise Refused(
                404,
                f"Unknown service ID {durations.quoted(service_id)}. "
                "Ensure that the service ID is passed, not the service name.",
            )
        for check in self.checks_of(service_id):
            del self.checks[check.check_id]
        self._touch(service.name)
        self.catalog_index = self._index
        self.changed()

    def update_check(self, check_id: str, status: str, output: str) -> None:
        """Notes what a probe found; nothing if the check has gone meanwhile."""
        check = self.checks.get(check_id)
        if check is None:
            return
        if status != "critical":
            check.critical_since = None
        elif check.critical_since is None:
            check.critical_since = self._clock()
        check.output = output
        # As in Consul, a new output alone is no news for those who wait.
        if check.status != status:
            check.status = status
            self._touch(check.service.name)
            self.changed()

    def reap(self) -> list[str]:
        """Deregisters what was critical for too long, and says which services."""
        now = self._clock()
        overdue = {
            check.service.service_id
            for check in self.checks.values()
            if check.definition.deregister_after > 0
            and check.critical_since is not None
            and now - check.critical_since > self._patience(check)
        }
        for service_id in overdue:
            self.deregister(service_id)
        return sorted(overdue)

    def checks_of(self, service_id: str) -> list[Check]:
        return [check for check in self.checks.values() if check.service.service_id == service_id]

    def status_of(self, service_id: str) -> str:
        """The worst status of the service's checks; passing where there is none."""
        statuses = {check.status for check in self.checks_of(service_id)}
        return next((status for status in ("critical", "warning") if status in statuses), "passing")

    def named(self, name: str) -> list[ServiceDefinition]:
        """The services of this name, in the order of their IDs."""
        found = [service for service in self.services.values() if service.name == name]
        return sorted(found, key=lambda service: service.service_id)

    def service_index(self, name: str) -> int:
        """The index of all that is known under a service's name, its checks included."""
        return self._service_indexes.get(name, self._vanished_index)

    def _patience(self, check: Check) -> float:
        return max(check.definition.deregister_after / durations.SECOND, self.reap_after_at_least)

    def _add_check(self, service: ServiceDefinition, number: int, definition: CheckDefinition) -> str:
        suffix = f":{number}" if len(service.checks) > 1 else ""
        check_id = definition.check_id or f"service:{service.service_id}{suffix}"
        old = self.checks.get(check_id)
        self.checks[check_id] = Check(
            check_id=check_id,
            name=definition.name or f"Service '{service.name}' check",
            definition=definition,
            service=service,
            status=old.status if old else definition.status or "critical",
            output=old.output if old else "",
        )
        return check_id

    def _visible_checks(self, service_id: str) -> dict[str, tuple[object, ...]]:
        """What the catalog shows of the checks; it does not show what they probe."""
        return {
            check.check_id: (check.name, check.status, check.definition.interval, check.definition.timeout)
            for check in self.checks_of(service_id)
        }

    def _touch(self, name: str) -> None:
        self._index += 1
        if self.named(name):
            self._service_indexes[name] = self._index
        else:
            # Forgotten names share one index, so that names do not pile up.
            self._service_indexes.pop(name, None)
            self._vanished_index = self._index
