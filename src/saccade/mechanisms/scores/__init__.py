"""How a pair is scored and scores become weights."""
