"""The operating-system process: its identity, forks, signals, exit hooks and the metrics thread."""
