"""One sequence over many devices."""
