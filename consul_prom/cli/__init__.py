"""The consul-prom command."""
