"""Requests at a steady rate, whatever the answers take: ``python -m tests.bench.headtohead.load host rate seconds``.

Each request has a connection of its own, as Gunicorn's sync workers want it. A time counts from when the request was
due, so that one that had to wait for others shows it. At the end the process prints the times, and how many failed.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from tests.bench.headtohead.programs import program

PATIENCE = 10.0


class Load(NamedTuple):
    """Seconds of each request that was answered, how many were not, and seconds of CPU that asking took.

    That is the same work whoever answers, so that it tells how even the machine was.
    """

    times: Sequence[float]
    failed: int
    cpu: float


class Paced:
    """Requests that begin at once, in a process of their own."""

    def __init__(self, host: str, *, rate: float, seconds: float) -> None:
        command = [sys.executable, "-m", "tests.bench.headtohead.load", host, str(rate), str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"

    def begin(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def end(self) -> Load:
        """Wait for the end."""
        printed, _ = self._process.communicate(timeout=600)
        return Load(*json.loads(printed))


def saturate(host: str, *, seconds: float) -> float:
    """Requests a second that hey gets answered, with 8 connections at a time."""
    command = [str(program("hey")), "-z", f"{seconds:g}s", "-c", "8", "-disable-keepalive", f"http://{host}:8000/"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True).stdout
    answered = sum(int(line.split()[1]) for line in printed.splitlines() if line.strip().startswith("[200]"))
    return answered / seconds


async def _one(host: str, due: float) -> float:
    reader, writer = await asyncio.open_connection(host, 8000)
    writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    if not answer.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(answer[:40])
    return asyncio.get_running_loop().time() - due


async def _pace(host: str, rate: float, seconds: float) -> Load:
    loop, used = asyncio.get_running_loop(), time.process_time()
    begun, tasks = loop.time(), []
    for number in range(int(rate * seconds)):
        due = begun + number / rate
        if (early := due - loop.time()) > 0:
            await asyncio.sleep(early)
        tasks.append(asyncio.create_task(asyncio.wait_for(_one(host, due), PATIENCE)))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    times = [result for result in results if isinstance(result, float)]
    return Load(times, len(results) - len(times), time.process_time() - used)


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(asyncio.run(_pace(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))))
