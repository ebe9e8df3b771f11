"""Attention between two sets, and pooling by it."""
