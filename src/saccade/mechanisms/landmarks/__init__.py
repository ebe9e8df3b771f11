"""Attention through a few tokens that stand for many."""
