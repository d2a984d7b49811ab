"""The checks of `consul-prom doctor`."""
