"""The page: samples of a registry and its ledger in the Prometheus text formats."""
