"""Idioms of the code: assignments, comprehensions, layout, and how code is counted."""

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

measure = runpy.run_path(str(ROOT / "scripts" / "size.py"))["measure"]
PRODUCT = ("dcar_core", "index_jobs", "app", "plugins")
FOLDERS = (*PRODUCT, "tests", "benchmarks")
MOST_TUPLE_ASSIGNMENTS_IN_1000_LINES = 3
MOST_COMPREHENSIONS_WITH_TWO_FORS = 46
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def tuple_assignments(tree: ast.Module) -> Iterator[ast.Assign]:
    """Yield assignments of several values to several names that are not a swap."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        target = node.targets[0]
        if not isinstance(target, ast.Tuple):
            continue
        targets = {ast.unparse(each) for each in target.elts}
        values = {ast.unparse(each) for each in node.value.elts}
        if targets != values:
            yield node


def test_an_assignment_is_of_one_value() -> None:
    for folder in FOLDERS:
        found = []
        lines = 0
        for path in modules(folder):
            source = path.read_text()
            lines += measure(source).code_lines
            for node in tuple_assignments(ast.parse(source)):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
        assert len(found) <= MOST_TUPLE_ASSIGNMENTS_IN_1000_LINES * lines / 1000, found


def test_few_comprehensions_have_two_fors() -> None:
    found = []
    for folder in PRODUCT:
        for path in modules(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, COMPREHENSIONS) and len(node.generators) > 1:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(found) <= MOST_COMPREHENSIONS_WITH_TWO_FORS, found


def test_the_formatter_lays_out_everything() -> None:
    mark = "fmt: " + "skip"
    for folder in FOLDERS:
        for path in modules(folder):
            assert mark not in path.read_text(), path


def test_every_test_module_says_what_it_is_about() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_size_counts_code_without_comments_docstrings_and_layout() -> None:
    source = '"""A module."""\n\n# A comment.\nvalue = add(\n    1,\n    2,\n)\n'
    size = measure(source)
    assert size.tokens == 9
    assert size.code_lines == 4
    assert size.lines == 7
