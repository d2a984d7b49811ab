"""The lock files that give each worker a slot, and the directory that holds them."""
