"""Fewer tokens."""
