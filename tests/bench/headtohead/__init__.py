"""All ways to tell Prometheus what several Python processes count, on the same work and in one run."""
