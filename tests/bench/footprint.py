"""What consul-prom costs a worker beside aiohttp and prometheus_client: import time, start and memory, by library.

    python -m tests.bench.footprint [rounds]

Each figure is of a fresh process: the median over the rounds, and the spread. Memory is the resident set.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from typing import Final

from tests.bench import bytecode

STEPS: Final = (
    ("aiohttp.web", "import aiohttp.web"),
    ("prometheus_client", "import prometheus_client"),
    ("prometheus_async", "import prometheus_async.aio"),
    ("filelock", "import filelock"),
    ("consul_prom", "import consul_prom.aiohttp"),
    ("start()", "worker = consul_prom.Worker(service='shop', dir=sys.argv[1], address='127.0.0.1'); worker.start()"),
    ("python-consul2, in our thread", "import consul"),
    ("serving and registering", "time.sleep(1)"),
)
MEASURE: Final = """
import json, sys, time
def rss():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
steps, found = json.loads(sys.argv[2]), []
for name, code in steps:
    memory, begun = rss(), time.perf_counter()
    exec(code)
    found.append((name, (time.perf_counter() - begun) * 1000, rss() - memory))
print(json.dumps(found))
worker.stop()
"""


def main(rounds: int) -> None:
    """Print the table."""
    bytecode.prepare()
    runs = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "-c", MEASURE, f"{directory}/slots", json.dumps(STEPS)]
            runs.append(json.loads(subprocess.check_output(command, text=True)))
    print(f"{'':32}{'ms':>18}{'MiB':>18}")
    for steps in zip(*runs, strict=True):
        times, sizes = [step[1] for step in steps], [step[2] for step in steps]
        print(f"{steps[0][0]:32}{_spread(times):>18}{_spread(sizes):>18}")
    own = [sum(step[2] for step in run[2:]) for run in runs]
    print(f"{'beyond the first two':32}{'':>18}{_spread(own):>18}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
