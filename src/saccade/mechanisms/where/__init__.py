"""Which (query, key) pairs are computed."""
