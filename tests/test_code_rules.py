"""Rules of the code: sizes of folders, names, imports, and what `--help` loads."""

import ast
import re
import subprocess
import sys
import time
from collections import defaultdict
from functools import cache
from pathlib import Path

from tests.support import parts

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dcar_core", "index_jobs", "app")
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MOST_MODULES_IN_A_PACKAGE = 6
MOST_MODULES_IN_A_FOLDER = 12


def modules(package: str) -> list[Path]:
    return [path for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"]


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def test_open_clip_is_imported_in_one_place() -> None:
    importers = {
        p.name
        for package in PACKAGES
        for p in modules(package)
        if re.search(r"^\s*(import|from) open_clip", p.read_text(), re.M)
    }
    assert importers == {"open_clip_source.py"}


def test_folders_stay_small_enough_to_read() -> None:
    for package in PACKAGES:
        for folder in {path.parent for path in modules(package)}:
            count = sum(path.name not in ("__init__.py", "__main__.py") for path in folder.glob("*.py"))
            assert count <= (MOST_MODULES_IN_A_PACKAGE if folder == ROOT / package else MOST_MODULES_IN_A_FOLDER), (
                folder
            )


def test_every_folder_documents_its_purpose() -> None:
    for package in PACKAGES:
        for folder in {path.parent for path in modules(package)} - {ROOT / package}:
            docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
            assert len(docstring.splitlines()) >= 3, (
                f"{folder} needs a docstring: what goes in, what comes out, who imports it"
            )


def test_no_two_classes_share_a_name() -> None:
    places = defaultdict(list)
    for package in PACKAGES:
        for path in modules(package):
            for node in nodes(path):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_help_does_not_load_torch() -> None:
    script = "import sys; from app import cli; sys.exit('torch' in sys.modules or 'faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_help_teaches_and_is_quick() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "app.cli", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert time.monotonic() - started < 5  # 0.4 s on an idle machine; this bound is for a busy one
    for command in ("demo", "train", "evaluate", "index", "serve", "search"):
        assert command in done.stdout


def test_the_image_has_what_the_compose_file_names() -> None:
    assert "--validation examples/emoji/" in (ROOT / "docker-compose.yml").read_text()
    assert "!examples/emoji/*/val.json" in (ROOT / ".dockerignore").read_text().splitlines()


def test_test_modules_share_helpers_through_support_alone() -> None:
    for path in TESTS:
        for node in nodes(path):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            shared = [name for name in names if name.split(".")[0] == "tests" or name.startswith("test_")]
            assert all(f"{name}.".startswith("tests.support.") for name in shared), f"{path} imports {shared}"


def test_async_tests_run_on_anyio() -> None:
    for path in TESTS:
        calls = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
        assert "asyncio.run" not in map(ast.unparse, calls), (
            f"{path}: write `async def test_...` instead of asyncio.run"
        )


def test_optional_parts_of_tests_are_named_in_one_place() -> None:
    """What a test needs decides whether it runs without extras, and whether CI runs it again with them."""
    exceptions = {"parts.py", "test_code_rules.py", "test_langchain_standard.py"}
    skips = re.compile(r"importorskip\(|skip\w*\(.*find_spec|which\(.*\n.*skip\(")
    assert [path.name for path in TESTS if path.name not in exceptions and skips.search(path.read_text())] == []


def test_missing_parts_are_told_in_a_line_each() -> None:
    reasons = ["needs redis", "needs openvino", "needs redis", "this file system has no files of that size"]
    assert parts.summary(reasons) == [
        "skipped 2 tests of Redis: apt-get install redis-server",
        "skipped 1 test of OpenVINO: make test EXTRAS=dev,openvino",
        "skipped 1 test: this file system has no files of that size",
    ]
