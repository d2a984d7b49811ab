"""The JSON documents of the agent's answers, each in the shape that Consul gives it."""

import hashlib
import ipaddress
import json
from dataclasses import dataclass
from typing import Any

from consul_prom.devagent import durations
from consul_prom.devagent.definition import ServiceDefinition
from consul_prom.devagent.state import Check, State

CONSUL_VERSION = "1.19.2"
DATACENTER = "dc1"
NODE_ID = "00000000-0000-4000-8000-000000000000"
NODE_META = {"consul-network-segment": "", "consul-version": CONSUL_VERSION}

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Node:
    """The machine of the agent, as the agent itself names it."""

    name: str
    address: str

    def at(self, port: int) -> str:
        return f"[{self.address}]:{port}" if ":" in self.address else f"{self.address}:{port}"


def service(definition: ServiceDefinition) -> Document:
    """One service in the agent's own words, without its hash."""
    tagged = _tagged_addresses(definition)
    return {
        "ID": definition.service_id,
        "Service": definition.name,
        "Tags": definition.tags,
        "Meta": dict(sorted(definition.meta.items())),
        "Port": definition.port,
        "Address": definition.address,
        **({"TaggedAddresses": tagged} if tagged else {}),
        "Weights": dict(definition.weights),
        "EnableTagOverride": definition.enable_tag_override,
        "Datacenter": DATACENTER,
    }


def content_hash(definition: ServiceDefinition) -> str:
    """The same for the same content, whatever its checks say and however often the agent restarts."""
    text = json.dumps(service(definition))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def agent_check(node: Node, check: Check) -> Document:
    definition = check.definition
    return _check(node, check) | {
        "Type": definition.kind,
        "Interval": durations.text_of(definition.interval),
        "Timeout": durations.text_of(definition.timeout) if definition.timeout else "",
    }


def agent_health(node: Node, state: State, definition: ServiceDefinition) -> Document:
    return {
        "AggregatedStatus": state.status_of(definition.service_id),
        "Service": service(definition),
        "Checks": [_check(node, check) for check in state.checks_of(definition.service_id)],
    }


def catalog_entry(node: Node, state: State, definition: ServiceDefinition) -> Document:
    """A service instance with its node and checks: what Prometheus discovers."""
    entry = service(definition)
    del entry["Datacenter"]
    entry["Meta"] = entry["Meta"] or None
    if not definition.port:
        del entry["Port"]
    checks = [agent_check(node, check) for check in state.checks_of(definition.service_id)]
    return {"Node": _node(node), "Service": entry, "Checks": [_node_check(node), *checks]}


def catalog_service(node: Node, definition: ServiceDefinition) -> Document:
    """One entry of ``catalog/service/<name>``, without what nobody here asks it for."""
    return {
        "Node": node.name,
        "Address": node.address,
        "ServiceID": definition.service_id,
        "ServiceName": definition.name,
        "ServiceAddress": definition.address,
        "ServicePort": definition.port,
        "ServiceTags": list(definition.tags),
        "ServiceMeta": dict(definition.meta),
    }


def myself(node: Node) -> Document:
    """What the agent says of itself, as far as clients look."""
    return {
        "Config": {
            "Datacenter": DATACENTER,
            "PrimaryDatacenter": DATACENTER,
            "NodeName": node.name,
            "NodeID": NODE_ID,
            "Server": True,
            "Version": CONSUL_VERSION,
        },
        "DebugConfig": {"AdvertiseAddrLAN": node.address, "DevMode": True, "NodeName": node.name},
        "Member": {
            "Name": node.name,
            "Addr": node.address,
            "Port": 8301,
            "Tags": {"dc": DATACENTER, "id": NODE_ID, "role": "consul"},
            "Status": 1,
        },
        "Meta": NODE_META,
    }


def _check(node: Node, check: Check) -> Document:
    return {
        "Node": node.name,
        "CheckID": check.check_id,
        "Name": check.name,
        "Status": check.status,
        "Notes": check.definition.notes,
        "Output": check.output,
        "ServiceID": check.service.service_id,
        "ServiceName": check.service.name,
        "ServiceTags": check.service.tags,
        "Type": "",
        "ExposedPort": 0,
        "Definition": {},
        "CreateIndex": 0,
        "ModifyIndex": 0,
    }


def _tagged_addresses(definition: ServiceDefinition) -> Document:
    address = {"Address": definition.address, "Port": definition.port}
    return dict.fromkeys(_networks(definition.address), address)


def _networks(address: str) -> list[str]:
    """The names under which Consul shows an address once more; none for a host name."""
    try:
        version = ipaddress.ip_address(address).version
    except ValueError:
        return []
    return [f"lan_ipv{version}", f"wan_ipv{version}"]


def _node(node: Node) -> Document:
    return {
        "ID": NODE_ID,
        "Node": node.name,
        "Address": node.address,
        "Datacenter": DATACENTER,
        "TaggedAddresses": dict.fromkeys(["lan", "wan", *_networks(node.address)], node.address),
        "Meta": NODE_META,
    }


def _node_check(node: Node) -> Document:
    """The check that every Consul node has: its agent is alive."""
    return {
        "Node": node.name,
        "CheckID": "serfHealth",
        "Name": "Serf Health Status",
        "Status": "passing",
        "Notes": "",
        "Output": "Agent alive and reachable",
        "ServiceID": "",
        "ServiceName": "",
        "ServiceTags": [],
        "Type": "",
        "Interval": "",
        "Timeout": "",
        "ExposedPort": 0,
        "Definition": {},
    }
