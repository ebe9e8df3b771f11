"""Edits of a model's attention at inference."""
