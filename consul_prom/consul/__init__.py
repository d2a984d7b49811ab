"""The Consul agent: HTTP client, registration, registrar and stale entries."""
