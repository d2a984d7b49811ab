"""All ways to tell Prometheus what several Python processes count, on the same work: ``python -m tests.bench.headtohead``."""
