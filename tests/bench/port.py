"""What those who should not be there cost a worker and its application: a crowd, slow-loris, a scanner.

python -m tests.bench.port [seconds]

Each round measures a calm and then each attack: how long a scrape on a connection of its own takes, how many fail, and
how many descriptors the process holds at most. The application computes without end, so a scrape waits for its turn in
the calm, too. The attackers are a process of their own on the same machine, and take their part of its processors.
"""

import http.client
import multiprocessing
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

ROUNDS = 3
WORKER = """
import resource, sys, time
import prometheus_client
import consul_prom

resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
turns = prometheus_client.Counter("turns", "Turns of the application.")
filler = prometheus_client.Counter("filler", "Series to render.", ["number"])
for number in range(1000):
    filler.labels(str(number)).inc()
with consul_prom.running(service="shop", address="127.0.0.1", consul_http_addr="127.0.0.1:1") as worker:
    while worker.url is None:
        time.sleep(0.01)
    print(worker.url, flush=True)
    while True:
        sum(range(20_000))
        turns.inc()
"""
Address = tuple[str, int]


def crowd(address: Address, number: int = 10_000) -> None:
    """Connections without a word, as many as there may be, each that is closed made anew."""
    held: list[socket.socket] = []
    while True:
        with suppress(OSError):
            held.append(socket.create_connection(address, 1))
        if len(held) > number:
            held.pop(0).close()


def loris(address: Address, number: int = 500) -> None:
    """Heads of requests that come byte by byte and never end."""
    held: list[socket.socket] = []
    while True:
        while len(held) < number:
            with suppress(OSError):
                held.append(socket.create_connection(address, 1))
                held[-1].sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-A: ")
        for client in list(held):
            try:
                client.sendall(b"a")
            except OSError:
                held.remove(client)
        time.sleep(0.01)


def scanner(address: Address) -> None:
    """What is no HTTP, paths that are none, heads that are too large, and who goes before the answer."""
    probes = (
        os.urandom(200),
        b"GET /wp-login.php HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 60_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
        b"",
    )
    while True:
        for probe in probes:
            with suppress(OSError), socket.create_connection(address, 1) as client:
                client.sendall(probe)


class Seen:
    """One measurement."""

    def __init__(self, pid: int, address: Address, seconds: float) -> None:
        self.took: list[float] = []
        self.failed = 0
        self.descriptors = 0
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            begun = time.perf_counter()
            try:
                scrape(address)
                self.took.append(time.perf_counter() - begun)
            except (OSError, http.client.HTTPException):
                self.failed += 1
            self.descriptors = max(self.descriptors, len(list(Path(f"/proc/{pid}/fd").iterdir())))
            time.sleep(0.1)


def scrape(address: Address) -> None:
    with closing(http.client.HTTPConnection(*address, timeout=10)) as connection:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        if answer.status != http.client.OK or b"turns_total " not in answer.read():
            raise http.client.HTTPException


def main(seconds: float = 10.0, rounds: int = ROUNDS) -> None:
    fork = multiprocessing.get_context("fork")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    attacks: Sequence[Callable[[Address], None]] = (crowd, loris, scanner)
    seen: dict[str, list[Seen]] = {name: [] for name in ("calm", *(attack.__name__ for attack in attacks))}
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "CONSUL_PROM_DIR": str(Path(folder) / "slots")}
        command = (
            sys.executable,
            "-c",
            f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n{WORKER}",
        )
        with subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as worker:
            try:
                assert worker.stdout
                parts = urlsplit(worker.stdout.readline().strip())
                address = (str(parts.hostname), int(parts.port or 0))
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                for _ in range(rounds):
                    for attack in attacks:
                        seen["calm"].append(Seen(worker.pid, address, seconds / 2))
                        attacker = fork.Process(target=attack, args=(address,), daemon=True)
                        attacker.start()
                        seen[attack.__name__].append(Seen(worker.pid, address, seconds))
                        attacker.kill()
                        attacker.join()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                worker.kill()
    print(f"{'':9}{'scrape: median':>15}{'slowest':>10}{'failed':>10}{'descriptors':>13}")
    for name, found in seen.items():
        took = [took for one in found for took in one.took]
        failed = sum(one.failed for one in found)
        counts, descriptors = f"{failed} of {len(took) + failed}", max(one.descriptors for one in found)
        median, slowest = statistics.median(took) * 1000, max(took) * 1000
        print(f"{name:9}{median:>12.1f} ms{slowest:>7.0f} ms{counts:>10}{descriptors:>13}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
