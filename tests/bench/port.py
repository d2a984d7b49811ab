"""What those who should not be there cost a worker and its application: a crowd, slow-loris, a scanner.

python -m tests.bench.port [seconds] [series] [tls]

Each round measures a calm and then each attack: how long a scrape on a connection of its own takes, how many fail, how
many descriptors the process holds at most, and how many connections a second the crowd makes. The application computes
without end, so a scrape waits for its turn in the calm, too. The attackers are a process of their own on the same
machine, and take their part of its processors.
"""

import http.client
import math
import multiprocessing
import os
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import trustme

ROUNDS = 3
WORKER = """
import resource, sys, time
import prometheus_client
import consul_prom

resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
turns = prometheus_client.Counter("turns", "Turns of the application.")
filler = prometheus_client.Counter("filler", "Series to render.", ["number"])
for number in range(int(sys.argv[1])):
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
made = multiprocessing.Value("Q")
"""Connections that the crowd has made."""


def crowd(address: Address, number: int = 10_000) -> None:
    """Connections without a word, as many as there may be, each that is closed made anew."""
    held: list[socket.socket] = []
    while True:
        with suppress(OSError):
            held.append(socket.create_connection(address, 1))
            made.value += 1
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

    def __init__(self, pid: int, url: str, seconds: float) -> None:
        self.took: list[float] = []
        self.failed = 0
        self.descriptors = 0
        begun_at, before = time.monotonic(), made.value
        while time.monotonic() < begun_at + seconds:
            begun = time.perf_counter()
            try:
                scrape(url)
                self.took.append(time.perf_counter() - begun)
            except (OSError, http.client.HTTPException):
                self.failed += 1
            self.descriptors = max(self.descriptors, len(list(Path(f"/proc/{pid}/fd").iterdir())))
            time.sleep(0.1)
        self.rate = (made.value - before) / (time.monotonic() - begun_at)


def scrape(url: str) -> None:
    trusting = ssl._create_unverified_context()  # noqa: S323  # the bench's own worker
    with urllib.request.urlopen(url, timeout=10, context=trusting if url.startswith("https:") else None) as answer:
        if b"turns_total " not in answer.read():
            raise http.client.HTTPException


@contextmanager
def working(series: int, *, tls: bool) -> Iterator[tuple[int, str]]:
    """A worker's pid and URL."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "CONSUL_PROM_DIR": str(Path(folder) / "slots")}
        if tls:
            trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(f"{folder}/cert.pem")
            (Path(folder) / "web.yml").write_text("tls_server_config: {cert_file: cert.pem, key_file: cert.pem}")
            environ["CONSUL_PROM_WEB_CONFIG"] = f"{folder}/web.yml"
        command = sys.executable, "-c", WORKER, str(series)
        with subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as worker:
            try:
                assert worker.stdout
                yield worker.pid, worker.stdout.readline().strip()
            finally:
                worker.kill()


def main(seconds: float = 10.0, series: int = 1000, *, tls: bool = False, rounds: int = ROUNDS) -> None:
    fork = multiprocessing.get_context("fork")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    attacks: Sequence[Callable[[Address], None]] = (crowd, loris, scanner)
    seen: dict[str, list[Seen]] = {name: [] for name in ("calm", *(attack.__name__ for attack in attacks))}
    with working(series, tls=tls) as (pid, url):
        parts = urlsplit(url)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        try:
            for _ in range(rounds):
                for attack in attacks:
                    seen["calm"].append(Seen(pid, url, seconds / 2))
                    attacker = fork.Process(target=attack, args=((parts.hostname, parts.port),), daemon=True)
                    attacker.start()
                    seen[attack.__name__].append(Seen(pid, url, seconds))
                    attacker.kill()
                    attacker.join()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(f"{'':9}{'scrape: median':>15}{'slowest':>10}{'failed':>10}{'descriptors':>13}{'made/s':>9}")
    for name, found in seen.items():
        took = [took for one in found for took in one.took] or [math.inf]
        failed = sum(one.failed for one in found)
        counts, descriptors = f"{failed} of {len(took) + failed}", max(one.descriptors for one in found)
        median, slowest = statistics.median(took) * 1000, max(took) * 1000
        rate = statistics.fmean(one.rate for one in found)
        print(f"{name:9}{median:>12.1f} ms{slowest:>7.0f} ms{counts:>10}{descriptors:>13}{rate:>9.0f}")


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((float, int), sys.argv[1:3], strict=False)), tls=sys.argv[3:] == ["tls"])
