"""Many workers, real client code and all, in a few processes: each has a registry, a slot, a thread and an endpoint.

    python -m tests.faults.fleet '{"count": 25, "service": "shop", ...}'

is one such process; it ends, and all its workers with it, at the end of its input.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry

from consul_prom import Worker
from tests import ROOT
from tests.services.consul import Consul


class Fleet:
    """A context manager over such processes. `services` tells how many workers of each service there are to be."""

    def __init__(self, services: Mapping[str, int], *, directory: Path, processes: int = 1, **settings: Any) -> None:
        self.services = services
        self.log = directory / "fleet.log"
        self.pids: list[int] = []
        self._settings = {"host": "web-1", "dir": str(directory / "slots"), **settings}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._shares = [
            {name: count // processes + (number < count % processes) for name, count in services.items()}
            for number in range(processes)
        ]

    def __enter__(self) -> Self:
        for share in self._shares:
            task = json.dumps({"services": share, "settings": self._settings})
            with self.log.open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.faults.fleet", task],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                )
            self._processes.append(process)
            self.pids.append(process.pid)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    def end(self, *, within: float = 30.0) -> list[int]:
        """Stop all workers; the exit codes."""
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
            if process.stdin and not process.stdin.closed:
                process.stdin.close()
        codes = []
        for process in self._processes:
            try:
                codes.append(process.wait(within))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
        return codes

    def pause(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)

    @property
    def peak(self) -> float:
        """The largest resident set that the processes ever had, in MiB."""
        return sum(_status(pid, "VmHWM") for pid in self.pids) / 1024

    @property
    def lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines()

    @property
    def ids(self) -> set[str]:
        """The entries that there are to be."""
        return {f"{name}.web-1.{slot}" for name, count in self.services.items() for slot in range(count)}

    def settled(self, consul: Consul) -> bool:
        """Whether the agent has just these, each at a port of its own."""
        status, found = consul.call("/v1/agent/services")
        if status != 200:
            return False
        names = {f"{name}-metrics" for name in self.services}
        ports = {key: entry["Port"] for key, entry in found.items() if entry["Service"] in names}
        return set(ports) == self.ids and len(set(ports.values())) == len(ports)


def _status(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Start the workers, and stop them at the end of the input."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    task = json.loads(sys.argv[1])
    workers = [
        Worker(registry=CollectorRegistry(), service=service, **task["settings"])
        for service, count in task["services"].items()
        for _ in range(count)
    ]
    for worker in workers:
        worker.start()
    sys.stdin.read()
    with ThreadPoolExecutor(max(len(workers), 1)) as pool:
        list(pool.map(Worker.stop, workers))


if __name__ == "__main__":
    main()
