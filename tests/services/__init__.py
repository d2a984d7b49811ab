"""The real programs that tests run against: where they come from, how they start and how they end."""
