"""What is kept of keys and values, and what is read back."""
