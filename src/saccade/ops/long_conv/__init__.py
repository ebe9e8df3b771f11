"""See `api`."""
