"""Rules of the code: sizes of folders, names, imports, and what `--help` loads."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.support import parts
from tests.support.paths import ROOT

PACKAGES = ("dcar_core", "index_jobs", "app")
MODULES = [
    path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MOST_MODULES_IN_A_PACKAGE = 6
MOST_MODULES_IN_A_FOLDER = 12


def test_open_clip_is_imported_in_one_place() -> None:
    imports = re.compile(r"^\s*(import|from) open_clip", re.M)
    assert [path.name for path in MODULES if imports.search(path.read_text())] == [
        "open_clip_source.py"
    ]


def test_folders_document_their_purpose_and_stay_small_enough_to_read() -> None:
    sizes = Counter(path.parent for path in MODULES if path.name != "__main__.py")
    for folder, count in sizes.items():
        is_package = folder.parent == ROOT
        assert count <= (
            MOST_MODULES_IN_A_PACKAGE if is_package else MOST_MODULES_IN_A_FOLDER
        ), folder
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert is_package or docstring, f"{folder}: what goes in, and what comes out"


def test_help_teaches_and_loads_no_model_library() -> None:
    script = (
        "import sys; from app import cli\ntry: cli.main()\nfinally: print({'torch',"
        " 'faiss'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("set()\n")
    for command in ("demo", "train", "evaluate", "index", "serve", "search"):
        assert command in done.stdout


def test_test_modules_share_helpers_through_support_alone() -> None:
    for path in TESTS:
        names = re.findall(
            r"^\s*(?:from|import) (tests\b[\w.]*|test_\w+)",
            path.read_text(),
            re.M,
        )
        assert [
            name for name in names if not f"{name}.".startswith("tests.support.")
        ] == [], path


def private_uses(path: Path, private: set[str]) -> Iterator[str]:
    """Yield attributes, imports and patch targets of a test module that are private
    names of the packages.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in (
            "self",
            "cls",
        ):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"[\w.]+", str(node.value)
        ):
            names = str(node.value).split(".")
        else:
            continue
        yield from (
            f"{path.name}:{node.lineno}: {name}" for name in names if name in private
        )


def test_tests_use_public_names_alone() -> None:
    defined = re.compile(r"(?:\b(?:def|class) |\bself\.|^)(_[a-zA-Z]\w*)", re.M)
    private: set[str] = set()
    for path in MODULES:
        private.update(defined.findall(path.read_text()))
    for path in TESTS:
        assert list(private_uses(path, private)) == []


def test_optional_parts_of_tests_are_named_in_one_place() -> None:
    """What a test needs decides whether it runs without extras, and whether CI runs it
    again with them.
    """
    exceptions = {"parts.py", "test_code_rules.py"}
    skips = re.compile(r"importorskip\(|skip\w*\(.*find_spec|which\(.*\n.*skip\(")
    assert [
        path.name
        for path in TESTS
        if path.name not in exceptions and skips.search(path.read_text())
    ] == []


def test_missing_parts_are_told_in_a_line_each() -> None:
    reasons = [
        "needs redis",
        "needs openvino",
        "needs redis",
        "this file system has no files of that size",
    ]
    assert parts.summary(reasons) == [
        "skipped 2 tests of Redis: apt-get install redis-server",
        "skipped 1 test of OpenVINO: run on a processor that it has wheels for",
        "skipped 1 test: this file system has no files of that size",
    ]
