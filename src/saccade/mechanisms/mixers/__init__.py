"""Token mixing without attention."""
