"""Reuse across denoising steps."""
