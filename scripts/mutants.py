"""Change critical code at random places, one at a time, and count the changes that a test notices.

    python scripts/mutants.py                         16 mutants of each target, a quarter of an hour of one core
    python scripts/mutants.py --only filters --each 60
    python scripts/mutants.py --seed 2                other places

- A mutant swaps a comparison, an operator, a truth value or a condition, adds one to a number, or drops a call, an
  exception or a returned value. Texts, logging and tables of numbers stay.
- Each runs only the tests of its target, in a copy of the checkout, in a process forked from one that has imported the
  libraries. A mutant that runs three times as long as the tests do counts as noticed.
- Noticed mutants are kept in `.mutants`: an interrupted run resumes, and a run after new tests repeats the survivors
  alone. A mutant of a changed module is another one. Without the file, all are tried.
- Survivors are printed: some change nothing that can be observed, the others want a test.
"""

import argparse
import ast
import hashlib
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("faiss", "fastapi", "httpx", "open_clip", "pyarrow.compute", "pytest", "redis.asyncio", "torch", "typer")
AIM = 90  # percent
TABLE = 9  # entries from which on a set or mapping of a file format is data
NOTICED = ROOT / ".mutants"

TARGETS = {
    "publish": (
        ["index_jobs/store/publish.py"],
        [
            "tests/index_jobs/test_artifact.py",
            "tests/index_jobs/test_publishing.py",
            "tests/index_jobs/test_durability.py",
            "tests/index_jobs/test_rebuild_killed.py::test_full_disk_is_reported_alike_by_every_library",
            "tests/index_jobs/test_updates.py::test_without_hard_links_files_are_copied",
        ],
    ),
    "files": (["dcar_core/util/files.py"], ["tests/dcar_core/test_files.py", "tests/index_jobs/test_durability.py"]),
    "manifest": (
        ["index_jobs/store/manifest.py"],
        ["tests/index_jobs/test_publishing.py", "tests/index_jobs/test_artifact.py"],
    ),
    "artifact": (
        ["index_jobs/store/artifact.py"],
        [
            "tests/index_jobs/test_publishing.py",
            "tests/index_jobs/test_artifact.py",
            "tests/index_jobs/test_relocation.py",
            "tests/index_jobs/test_additions.py::test_added_items_are_found_beside_the_others",
            "tests/index_jobs/test_removals.py::test_removed_item_is_never_found",
            "tests/index_jobs/test_removals.py::test_removed_rows_that_do_not_exist_are_refused",
        ],
    ),
    "filters": (["index_jobs/store/filters.py"], ["tests/index_jobs/test_filters.py"]),
    "images": (
        [f"dcar_core/images/{name}.py" for name in ("containers", "gif", "isobmff", "jpeg", "png", "tiff", "webp")],
        [
            "tests/dcar_core/test_image_structure.py",
            "tests/dcar_core/test_isobmff.py",
            "tests/dcar_core/test_hostile_images.py",
            "tests/dcar_core/test_images.py",
        ],
    ),
    "keys": (["app/core/keys.py"], ["tests/app/test_rate_limit.py", "tests/app/test_access.py"]),
    "rate limits": (["app/core/rate_limit.py"], ["tests/app/test_rate_limit.py", "tests/app/test_access.py"]),
    "body limit": (["app/middleware/body_limit.py"], ["tests/app/test_body_limit.py", "tests/app/test_limits.py"]),
    "resume": (["dcar_core/training/train_state.py"], ["tests/dcar_core/test_train_state.py"]),
}

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A changed module. number, place: of the node in its tree, and of the change among those that fit the node."""

    path: str
    number: int
    place: int
    line: int
    change: str

    @cached_property
    def source(self) -> str:
        tree = ast.parse((ROOT / self.path).read_text())
        node = next(islice(ast.walk(tree), self.number, None))
        _, apply = list(_changes(node))[self.place]
        apply(node)
        return ast.unparse(ast.fix_missing_locations(tree))

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.path}\0{self.source}".encode()).hexdigest()[:20]


def mutants(path: str) -> Iterator[Mutant]:
    """Yield every mutant of a module."""
    tree = ast.parse((ROOT / path).read_text())
    number_of = {id(node): number for number, node in enumerate(ast.walk(tree))}
    for node in _observable(tree):
        for place, (change, _) in enumerate(_changes(node)):
            told = f"{change}: {ast.unparse(node).splitlines()[0][:70]}"
            yield Mutant(path, number_of[id(node)], place, getattr(node, "lineno", 0), told)


def _observable(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without annotations, logging, messages of errors, and imports for types."""
    if isinstance(node, ast.Raise):
        yield node
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger."):
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: a guard that never applies
        return
    if (isinstance(node, ast.Set) and len(node.elts) >= TABLE) or (
        isinstance(node, ast.Dict) and len(node.keys) >= TABLE
    ):
        return
    yield node
    for name, field in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                yield from _observable(child)


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], None]]]:
    """Yield the changes that fit a node: what they do, and how they are applied to it."""
    operator = getattr(node, "op", None)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _SWAPS:
        yield "swap", lambda it: it.ops.__setitem__(0, _SWAPS[type(it.ops[0])]())  # type: ignore[attr-defined]
    if isinstance(node, ast.BoolOp | ast.BinOp | ast.AugAssign) and type(operator) in _SWAPS:
        yield "swap", lambda it: setattr(it, "op", _SWAPS[type(it.op)]())  # type: ignore[attr-defined]
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "negate", lambda it: setattr(it, "test", ast.UnaryOp(ast.Not(), it.test))  # type: ignore[attr-defined]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "negate", lambda it: setattr(it, "value", not it.value)  # type: ignore[attr-defined]
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "add one", lambda it: setattr(it, "value", it.value + 1)  # type: ignore[attr-defined]
    if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield "return None", lambda it: setattr(it, "value", ast.Constant(None))
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await)
    if is_call and not ast.unparse(node).startswith("logger."):
        yield "drop", lambda it: setattr(it, "value", ast.Constant(None))
    if isinstance(node, ast.Raise) and node.exc is not None:
        yield "drop", _drop_raise


def _drop_raise(it: ast.AST) -> None:
    it.__class__ = ast.Pass  # type: ignore[assignment]
    it.__dict__ = {"lineno": 0, "col_offset": 0}


def run_tests(folder: Path, tests: list[str], timeout: float) -> tuple[bool, float]:
    """Run tests of the copy in a forked process; return whether all passed, and the seconds."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            _become_pytest(folder, tests)
        finally:
            os._exit(3)
    while time.monotonic() < started + timeout:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        status = 1
        print(f"stopped after {timeout:.0f} s", file=sys.stderr, flush=True)
    with suppress(ProcessLookupError):  # what it started, and itself if it takes too long
        os.killpg(child, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(child, 0)
    return status == 0, time.monotonic() - started


def _become_pytest(folder: Path, tests: list[str]) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = str(folder)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import pytest

    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--basetemp", str(folder / "temporary")]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # libraries are there before pytest starts
    try:
        os._exit(pytest.main([*options, *tests]))
    except BaseException:
        traceback.print_exc()


def copy_checkout(folder: Path) -> None:
    """Copy what git knows, as it is in the working tree."""
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(TARGETS), help="a target; may be repeated")
    parser.add_argument("--each", type=int, default=16, help="mutants of each target")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    for name in LIBRARIES:
        importlib.import_module(name)
    known = set(NOTICED.read_text().split()) if NOTICED.is_file() else set[str]()
    rows, survivors = [], []
    with tempfile.TemporaryDirectory() as temporary, NOTICED.open("a") as log:
        folder = Path(temporary)
        copy_checkout(folder)
        for target in given.only or TARGETS:
            paths, tests = TARGETS[target]
            every = [mutant for path in paths for mutant in mutants(path)]
            chosen = random.Random(given.seed).sample(every, min(given.each, len(every)))
            left = [mutant for mutant in chosen if mutant.key not in known]
            passed, usual = run_tests(folder, tests, 600) if left else (True, 0)
            if not passed:
                sys.exit(f"{target}: the tests fail without a mutant:\n{(folder / 'log').read_text()}")
            noticed = len(chosen) - len(left)
            for mutant in left:
                (folder / mutant.path).write_text(mutant.source)
                passed, _ = run_tests(folder, tests, 3 * usual + 20)
                shutil.copy2(ROOT / mutant.path, folder / mutant.path)
                noticed += not passed
                if passed:
                    survivors.append(f"{mutant.path}:{mutant.line}: {mutant.change}")
                    print(f"survived: {survivors[-1]}", file=sys.stderr, flush=True)
                else:
                    print(mutant.key, file=log, flush=True)
            rows.append((target, len(chosen), len(every), noticed))
            print(f"{target}: {noticed} of {len(chosen)}, tests take {usual:.0f} s", file=sys.stderr, flush=True)
    print("| target | mutants | of | noticed |\n| --- | --- | --- | --- |")
    for target, count, whole, noticed in rows:
        print(f"| {target} | {count} | {whole} | {noticed} |")
    count, noticed = (sum(row[column] for row in rows) for column in (1, 3))
    print(f"\n{noticed} of {count} noticed, {100 * noticed / count:.0f} %; survivors:")
    print("\n".join(survivors) or "none")
    sys.exit(100 * noticed < AIM * count)


if __name__ == "__main__":
    main()
