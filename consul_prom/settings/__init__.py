"""Settings: one row each, read from arguments and the environment."""
