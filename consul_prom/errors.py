"""Everything that consul-prom raises, as one tree.

ConsulPromError
├── SettingsError            a setting is missing or wrong; names the setting and the value
├── SlotError                the directory or a lock cannot be used
├── LedgerError              the counters cannot be kept in a file, and live in memory
├── EndpointError            the metrics server cannot start, stop or answer
├── DemoError                the demo cannot go on, or did not see what it promises
└── AgentError               the Consul agent did not do what was asked
    ├── AgentUnreachable     no connection: refused, no such host, TLS, reset
    ├── AgentTimeout         no answer in time; what was asked may still take effect
    ├── AgentRejected        400, 405: the request itself is wrong, asking again is no use
    ├── AgentDenied          401, 403: the token is unknown or lacks a right
    │   └── TokenUnreadable  the token's file is missing, empty, closed to us or no text
    ├── AgentNotFound        404: no such service
    ├── AgentBusy            429: too many connections or requests
    ├── AgentFailed          5xx: the agent or its servers cannot answer now
    ├── AgentConfused        an answer that no Consul agent gives
    └── EntryTaken           another live process, or someone else, has the entry's ID on this agent
"""


class ConsulPromError(Exception):
    pass


class SettingsError(ConsulPromError, ValueError):
    """A setting is missing or wrong. `from_code` tells an argument from the environment."""

    def __init__(self, message: str, *, from_code: bool) -> None:
        super().__init__(message)
        self.from_code = from_code


class SlotError(ConsulPromError):
    pass


class LedgerError(ConsulPromError):
    pass


class EndpointError(ConsulPromError):
    pass


class DemoError(ConsulPromError):
    pass


class AgentError(ConsulPromError):
    """Base of all failures between us and the agent; `reason` is short and stable, fit for a label."""

    reason = "error"


class AgentUnreachable(AgentError):
    reason = "unreachable"


class AgentTimeout(AgentError):
    reason = "timeout"


class AgentRejected(AgentError):
    reason = "rejected"


class AgentDenied(AgentError):
    reason = "denied"


class TokenUnreadable(AgentDenied):
    reason = "token"


class AgentNotFound(AgentError):
    reason = "not_found"


class AgentBusy(AgentError):
    reason = "busy"


class AgentFailed(AgentError):
    reason = "failed"


class AgentConfused(AgentError):
    reason = "confused"


class EntryTaken(AgentError):
    reason = "taken"
