"""Measuring mechanisms and engines."""

from saccade.bench.compare import Comparison, Row, compare, parse_mechanism, random_problem

__all__ = ["Comparison", "Row", "compare", "parse_mechanism", "random_problem"]
