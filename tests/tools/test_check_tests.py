"""The lint that refuses comparisons which assert nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

PATH = Path(__file__).parents[2] / "tools" / "check_tests.py"
spec = importlib.util.spec_from_file_location("check_tests", PATH)
check_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_tests)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("torch.equal(a, b)", [1]),
        ("assert torch.equal(a, b)", []),
        ("a == b", [1]),
        ("x = 1\nnp.allclose(a, b)\n", [2]),
        ("(a == b).all()", [1]),
        ("torch.testing.assert_close(a, b)", []),
        ("a == b and c", [1]),
    ],
)
def test_dropped_comparisons_are_found(source, lines):
    assert check_tests.dropped_comparisons(source) == lines
