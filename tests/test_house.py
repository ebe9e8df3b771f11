"""The house keeps its own rules: short files and functions, nothing unfinished or unsafe, an oracle per mechanism."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import saccade
from saccade.catalog import ROOMS, Card, cards
from saccade.catalog.papers import paper_titles

pytestmark = pytest.mark.quick

SOURCE = Path(saccade.__file__).parent
ORACLES = Path(__file__).parent / "oracles"
LONGEST_FILE = 300
LONGEST_BODY = 50
UNFINISHED = ("TODO", "FIXME", "XXX", "HACK")
FORBIDDEN_CALLS = {"eval", "exec", "torch.load"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def outside_kernels() -> list[Path]:
    return [path for path in modules() if path.relative_to(SOURCE).parts[0] != "kernels"]


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(text(path))


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(SOURCE).as_posix()}:{line}"


def long_bodies(module: ast.Module) -> Iterator[tuple[int, int]]:
    """`(line, lines)` of every function whose body, without its docstring, is too long."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = node.body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if lines > LONGEST_BODY:
                yield node.lineno, lines


def forbidden(module: ast.Module) -> Iterator[tuple[int, str]]:
    """`(line, what)` of calls and imports that run code from data, and of what is left to be written."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            yield node.lineno, f"{ast.unparse(node.func)}()"
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.value.lineno, f"{node.arg}={ast.unparse(node.value)}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from ((node.lineno, f"import {name}") for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if ast.unparse(raised) == "NotImplementedError":
                yield node.lineno, "raise NotImplementedError"


def unfinished(source: str) -> Iterator[tuple[int, str]]:
    """`(line, comment)` of comments that announce work."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and any(word in token.string for word in UNFINISHED):
            yield token.start[0], token.string


def test_files_are_found():
    assert len(modules()) > 100
    assert {path.relative_to(SOURCE).parts[0] for path in modules()} >= {"ops", "mechanisms", "plug", "tune", "kernels"}


def test_files_are_short():
    lengths = {path: len(text(path).splitlines()) for path in outside_kernels()}
    assert [place(path, lines) for path, lines in lengths.items() if lines > LONGEST_FILE] == []


def test_function_bodies_are_short():
    assert [place(path, line) for path in outside_kernels() for line, _ in long_bodies(tree(path))] == []


def test_nothing_is_left_to_be_written():
    assert [f"{place(path, line)} {what}" for path in modules() for line, what in unfinished(text(path))] == []


def test_no_code_is_run_from_data():
    assert [f"{place(path, line)} {what}" for path in modules() for line, what in forbidden(tree(path))] == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("eval('1')", "eval()"),
        ("exec('x = 1')", "exec()"),
        ("torch.load(path)", "torch.load()"),
        ("import pickle", "import pickle"),
        ("from pickle import loads", "import pickle"),
        ("load(name, trust_remote_code=True)", "trust_remote_code=True"),
        ("load(name, trust_remote_code=wanted)", "trust_remote_code=wanted"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("raise NotImplementedError", "raise NotImplementedError"),
        ("raise NotImplementedError('later')", "raise NotImplementedError"),
    ],
)
def test_the_check_finds(source, what):
    assert list(forbidden(ast.parse(source))) == [(1, what)]


@pytest.mark.parametrize(
    "source", ["model.eval()", "'never eval(x), pickle or torch.load(y)'", "load(name, trust_remote_code=False)"]
)
def test_the_check_lets_pass(source):
    assert list(forbidden(ast.parse(source))) == []


def test_the_check_finds_unfinished_comments_and_long_bodies():
    assert list(unfinished("x = 1  # TODO later\ny = 'TODO'\n")) == [(1, "# TODO later")]
    lines = "".join("    x = 1\n" for _ in range(LONGEST_BODY))
    assert list(long_bodies(ast.parse(f"def f():\n    '''Of any\n    length.'''\n{lines}"))) == []
    assert list(long_bodies(ast.parse(f"def f():\n{lines}    x = 1\n"))) == [(1, LONGEST_BODY + 1)]


@pytest.mark.parametrize("card", [pytest.param(card, id=card.name) for card in cards()])
def test_every_mechanism_has_an_oracle_and_papers(card: Card):
    oracle = ORACLES / f"test_{card.name}.py"
    assert oracle.is_file()
    assert "def test_" in oracle.read_text(encoding="utf-8")
    assert set(card.papers) <= paper_titles()
    assert card.papers or card.other_papers


def test_every_oracle_belongs_to_a_mechanism():
    assert {path.stem.removeprefix("test_") for path in ORACLES.glob("test_*.py")} == {card.name for card in cards()}


def test_mechanisms_of_catalogued_papers_and_rooms_are_all_there():
    assert sum(bool(card.papers) for card in cards()) >= 28
    assert {card.room for card in cards()} == set(ROOMS)


def test_contributing_shows_the_shortest_mechanism():
    """The example of CONTRIBUTING.md is what it says, and its formula is the one in the file."""
    homes = {Path(inspect.getfile(card.target)): card for card in cards()}
    shortest = min(homes, key=lambda path: len(text(path).splitlines()))
    guide = text(Path(__file__).parents[1] / "CONTRIBUTING.md")
    assert f"mechanisms/{homes[shortest].room}/{shortest.name}" in guide
    formula = text(shortest).rpartition('"""')[2].strip()
    assert all(line.strip() in guide for line in formula.splitlines())
