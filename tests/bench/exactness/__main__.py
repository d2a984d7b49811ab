"""The command: `python -m tests.bench.exactness [requests] [scenario or way ...]`."""

import sys

from tests.bench.exactness.harness import main

main(int(sys.argv[1]) if len(sys.argv) > 1 else 3000, sys.argv[2:])
