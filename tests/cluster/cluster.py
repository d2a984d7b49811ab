"""Three servers and a client agent, as workers of a real datacenter have them."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from tests.services.consul import Config, Consul, merged
from tests.services.program import own_address
from tests.services.waiting import wait_until

QUICK = {"retry_interval": "1s", "retry_interval_wan": "1s"}


class Cluster:
    """`servers`, and `agent`, which is no server and is what workers talk to. *config* is merged over all of them."""

    def __init__(self, *, config: Config | None = None) -> None:
        addresses = [own_address() for _ in range(3)]
        common = merged({"retry_join": addresses, **QUICK}, config or {})
        self.servers = [
            Consul(dev=False, address=address, config={**common, "bootstrap_expect": 3}) for address in addresses
        ]
        client = {"server": False, "bootstrap_expect": None, "performance": None}
        self.agent = Consul(dev=False, config={**common, **client})

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self.close)
            self.start(self.servers)
            self.agent.start()
            undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        for program in (self.agent, *self.servers):
            program.kill()  # nothing to part from: leaving would take the client agent seconds
            program.close()

    def start(self, servers: list[Consul]) -> None:
        """Start *servers* together, since one alone is never ready."""
        with ThreadPoolExecutor(len(servers)) as starters:
            list(starters.map(Consul.start, servers))

    def leader(self) -> Consul:
        """The server that leads now."""

        def leading() -> Consul | None:
            for server in self.servers:
                if server.running:
                    status, address = server.call("/v1/status/leader", timeout=5)
                    found = [each for each in self.servers if address == f"{each.address}:8300"]
                    if status == 200 and found and found[0].running:
                        return found[0]
            return None

        found = wait_until(leading, within=60, what="a leader")
        assert found
        return found

    def hanging(self) -> bool:
        """Whether the client agent does not answer."""
        try:
            self.agent.call("/v1/agent/services", timeout=1)
        except TimeoutError:
            return True
        return False

    def catalogue(self, server: Consul, name: str) -> dict[str, dict[str, Any]]:
        """The entries of *name* by ID as *server* has them, which is what a Prometheus there reads."""
        status, found = server.call(f"/v1/health/service/{name}?stale", timeout=5)
        assert status == 200, found
        return {each["Service"]["ID"]: each["Service"] for each in found}
