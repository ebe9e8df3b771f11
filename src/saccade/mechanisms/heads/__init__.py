"""How heads share projections and maps."""
