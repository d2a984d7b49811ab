"""The metrics HTTP server: its listener, /metrics, TLS and passwords."""
