"""The checks of an agent at work: each probes its service every interval, first at a random point of the first one."""

import asyncio
import random
import urllib.parse

import aiohttp

from consul_prom.devagent import durations
from consul_prom.devagent.definition import CheckDefinition
from consul_prom.devagent.state import Check, State

DEFAULT_TIMEOUT = 10.0
OUTPUT_SIZE = 4096
_HEADERS = {
    "User-Agent": "Consul Health Check",
    "Accept": "text/plain, text/*, */*",
    "Accept-Encoding": "gzip",
}


class CheckRunner:
    """Keeps one task for each check of the state."""

    def __init__(self, state: State, *, interval_at_least: float) -> None:
        self._state = state
        self._interval_at_least = interval_at_least
        self._tasks: dict[str, tuple[Check, asyncio.Task[None]]] = {}
        # A new connection for each probe, as Consul does: the one before tells nothing about accepting the next.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0))

    def follow(self) -> None:
        """Starts what was registered and stops what has gone since the last call."""
        for check_id, (check, task) in list(self._tasks.items()):
            if self._state.checks.get(check_id) is not check:
                task.cancel()
                del self._tasks[check_id]
        for check_id, check in self._state.checks.items():
            if check_id not in self._tasks:
                self._tasks[check_id] = check, asyncio.create_task(self._run(check), name=f"check {check_id}")

    async def aclose(self) -> None:
        tasks = [task for _, task in self._tasks.values()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    async def _run(self, check: Check) -> None:
        interval = max(check.definition.interval / durations.SECOND, self._interval_at_least)
        await asyncio.sleep(random.uniform(0, interval))  # noqa: S311 - spreads load, hides nothing
        while True:
            probe = (
                probe_http(self._session, check.definition) if check.definition.http else probe_tcp(check.definition)
            )
            status, output = await probe
            if self._state.checks.get(check.check_id) is check:
                self._state.update_check(check.check_id, status, output)
            await asyncio.sleep(interval)


async def probe_http(session: aiohttp.ClientSession, definition: CheckDefinition) -> tuple[str, str]:
    """Status and output: 2xx is passing, 429 is warning, all else is critical."""
    method = definition.method or "GET"
    url = definition.http
    headers = _HEADERS | {key: ", ".join(values) for key, values in definition.header.items()}
    try:
        async with session.request(
            method,
            url,
            data=definition.body or None,
            headers=headers,
            ssl=not definition.tls_skip_verify,
            timeout=aiohttp.ClientTimeout(total=_timeout(definition)),
        ) as response:
            body = await _tail(response, definition.output_max_size or OUTPUT_SIZE)
    except TimeoutError:
        return "critical", f'{method.capitalize()} "{url}": context deadline exceeded (Client.Timeout exceeded)'
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        return "critical", f'{method.capitalize()} "{url}": {exc}'
    output = f"HTTP {method} {url}: {response.status} {response.reason} Output: {body.decode('utf-8', 'replace')}"
    if 200 <= response.status <= 299:
        return "passing", output
    return "warning" if response.status == 429 else "critical", output


async def probe_tcp(definition: CheckDefinition) -> tuple[str, str]:
    """Status and output: passing is what accepts a connection."""
    target = urllib.parse.urlsplit(f"//{definition.tcp}")
    try:
        async with asyncio.timeout(_timeout(definition)):
            _, writer = await asyncio.open_connection(target.hostname, target.port)
    except (OSError, ValueError) as exc:
        return "critical", f"dial tcp {definition.tcp}: {exc}"
    writer.close()
    return "passing", f"TCP connect {definition.tcp}: Success"


def _timeout(definition: CheckDefinition) -> float:
    return definition.timeout / durations.SECOND or DEFAULT_TIMEOUT


async def _tail(response: aiohttp.ClientResponse, size: int) -> bytes:
    """The end of a body, in bounded memory: Consul keeps its output in a ring."""
    tail = b""
    async for chunk in response.content.iter_any():
        tail = (tail + chunk)[-size:]
    return tail
