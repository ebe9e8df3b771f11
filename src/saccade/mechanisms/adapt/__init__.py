"""Small trained additions around frozen attention."""
