"""The least ACL policies for workers, the command and Prometheus."""

from consul_prom.consul.acl import write_rule
from consul_prom.settings.settings import Settings, check_named


def acl(settings: Settings) -> str:
    """The least ACL policies of all who take part, in HCL, with the reason of each rule.

    https://developer.hashicorp.com/consul/docs/security/acl/acl-rules

    Raises:
        SettingsError: no service is set.
    """
    check_named(settings)
    name = settings.consul_service
    return _ACL.format(name=name, write=write_rule(name))


_ACL = """\
# Each part is a policy of its own: consul acl policy create -name <name> -rules @<file>

# ==== The workers: CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE
# To register, read, watch, repair and deregister their own entries, in the catalogue too.
{write}
# Optional, to ask the agent which address it advertises. Without it a worker takes the default route's source
# address, unless CONSUL_PROM_ADDRESS is set.
# agent_prefix "" {{ policy = "read" }}

# ==== The commands: consul-prom list, deregister, doctor, top
# To see the entries, whose health comes with them, and to remove those of dead workers.
{write}
# Optional, for doctor and top: to see other hosts' workers, and what the agent tells of itself.
# node_prefix "" {{ policy = "read" }}
# agent_prefix "" {{ policy = "read" }}

# ==== Prometheus
# To read the entries, and the nodes that they are on: without the second it finds nothing, and says nothing.
service "{name}" {{ policy = "read" }}
node_prefix "" {{ policy = "read" }}
# To ask the agent for its datacenter. Not needed where consul_sd_configs sets `datacenter`.
agent_prefix "" {{ policy = "read" }}

# ==== Every agent: acl.tokens.agent in its configuration
# To take out of the catalogue what was deregistered. Without it the entry of a killed worker stays there, passing.
node_prefix "" {{ policy = "write" }}
"""
