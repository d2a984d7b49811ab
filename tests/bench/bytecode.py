"""A checkout as pip would install it: with bytecode. Without, its first import measures the compiler."""

import compileall
from pathlib import Path

import consul_prom


def prepare() -> None:
    """Write what is missing or out of date."""
    compileall.compile_dir(Path(consul_prom.__file__).parent, quiet=1)
