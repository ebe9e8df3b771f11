"""Measuring mechanisms and engines."""

from saccade.bench.compare import Comparison, Problem, Row, compare, parse_mechanism
from saccade.bench.problems import random_problem
from saccade.bench.room import RoomComparison, RoomRow, compare_room

__all__ = [
    "Comparison",
    "Problem",
    "RoomComparison",
    "RoomRow",
    "Row",
    "compare",
    "compare_room",
    "parse_mechanism",
    "random_problem",
]
