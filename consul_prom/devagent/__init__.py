"""A Consul agent in memory, for the demo and for tests: Consul's HTTP API as far as this package needs it."""

from consul_prom.devagent.agent import DevAgent, running
from consul_prom.devagent.faults import Fault

__all__ = ["DevAgent", "Fault", "running"]
