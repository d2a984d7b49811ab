"""Counters that outlive their process: the mapped file, the values in it, and the registry that binds them."""
