"""What tests make an agent do wrong."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Happens to each request of `method` whose path begins with `path`; empty means any.

    `delay` seconds pass first. Then `hang` never answers, `reset` breaks the connection, `status` is answered with
    `body` and `headers`; with none of the three the request goes its normal way. With `late` the request takes effect
    before any of that: the answer alone is lost.
    """

    method: str = ""
    path: str = ""
    delay: float = 0.0
    hang: bool = False
    reset: bool = False
    status: int = 0
    body: str | bytes = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    late: bool = False

    def concerns(self, method: str, path: str) -> bool:
        return self.method in {"", method} and path.startswith(self.path)
