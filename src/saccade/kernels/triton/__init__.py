"""Triton kernels (none yet)."""
