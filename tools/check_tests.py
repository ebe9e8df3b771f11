"""Refuse comparisons in tests that assert nothing: `torch.equal(a, b)` or `a == b` as a bare statement."""

import ast
import sys
from pathlib import Path

COMPARISONS = {"allclose", "equal", "array_equal", "isclose", "is_close", "check_equal", "all", "any"}


def dropped_comparisons(source: str) -> list[int]:
    """Line numbers of statements whose comparison is thrown away."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Expr):
            continue
        value = node.value
        called = getattr(value, "func", None)
        name = getattr(called, "attr", getattr(called, "id", ""))
        if isinstance(value, ast.Compare | ast.BoolOp) or (isinstance(value, ast.Call) and name in COMPARISONS):
            lines.append(node.lineno)
    return lines


def main(folders: list[str]) -> int:
    """Print every dropped comparison under `folders`; 1 if there is one."""
    found = [
        f"{path}:{line}: a comparison that asserts nothing"
        for folder in folders
        for path in sorted(Path(folder).rglob("*.py"))
        for line in dropped_comparisons(path.read_text(encoding="utf-8"))
    ]
    print("\n".join(found) or "every comparison in the tests is asserted")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
