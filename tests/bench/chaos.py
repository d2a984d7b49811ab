"""What clients feel of random faults, with consul-prom and without it.

    python -m tests.bench.chaos [seconds] [seeds]

The same seed gives the same choice of faults; how many fit into the time is up to the machine.
"""

import sys

from tests.e2e.chaos import Chaos


def main(seconds: float, seeds: int) -> None:
    """Print a line a run: faults, requests, those that failed, and those that no kill or replacement explains."""
    print(f"{'seed':>4} {'consul-prom':>12} {'faults':>7} {'requests':>9} {'failed':>7} {'unexplained':>12}")
    for seed in range(1, seeds + 1):
        for enabled in (True, False):
            with Chaos(seed, enabled=enabled) as chaos:
                chaos.rage(seconds)
                clients, state = chaos.clients, "on" if enabled else "off"
                failed, unexplained = len(clients.failures), len(chaos.unexcused())
                columns = f"{seed:>4} {state:>12} {len(chaos.done):>7} {clients.asked:>9} {failed:>7} {unexplained:>12}"
                print(columns, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 180, int(sys.argv[2]) if len(sys.argv) > 2 else 2)
