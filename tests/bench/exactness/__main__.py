"""The command: `python -m tests.bench.exactness [--requests=3000] [--interval=1] [scenario or way ...]`."""

import argparse

from tests.bench.exactness.harness import main

parser = argparse.ArgumentParser(prog="python -m tests.bench.exactness")
parser.add_argument("--requests", type=int, default=3000)
parser.add_argument("--interval", type=int, default=1, help="seconds between scrapes")
parser.add_argument("names", nargs="*", metavar="scenario or way", help="only these")
given = parser.parse_args()
main(given.names, requests=given.requests, interval=given.interval)
