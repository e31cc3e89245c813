"""Print the tokens of code by folder; exit with 1 where a package is above its budget.

    python scripts/size.py    compare the tracked files with [tool.size.budgets]

Tokens are Python's own, without comments, docstrings, newlines and indentation. So
layout, blank lines and documentation cost nothing, and a longer line saves nothing.
"Tokens a line" counts the lines on which such a token starts.
"""

import ast
import io
import subprocess
import sys
import tokenize
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = ROOT / "pyproject.toml"
PACKAGES = ("dcar_core", "index_jobs", "app")
LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


@dataclass
class Size:
    """How much code one or several files hold."""

    tokens: int = 0
    code_lines: int = 0
    lines: int = 0

    def add(self, other: "Size") -> None:
        self.tokens += other.tokens
        self.code_lines += other.code_lines
        self.lines += other.lines


def measure(source: str) -> Size:
    """Return the size of one module's source."""
    docstrings = set(docstring_lines(ast.parse(source)))
    tokens = 0
    code_lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row = token.start[0]
        if token.type in LAYOUT:
            continue
        if token.type == tokenize.STRING and row in docstrings:
            continue
        tokens += 1
        code_lines.add(row)
    return Size(tokens, len(code_lines), source.count("\n"))


def docstring_lines(tree: ast.Module) -> Iterator[int]:
    """Yield the numbers of the lines that docstrings of the module cover."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False):
            docstring = node.body[0]
            yield from range(docstring.lineno, (docstring.end_lineno or 0) + 1)


def groups(name: str) -> list[str]:
    """Return the rows of the table that a tracked file counts in."""
    parts = name.split("/")
    if parts[0] in PACKAGES:
        folder = parts[1] if len(parts) > 2 else "*.py"
        return ["packages", parts[0], f"{parts[0]}/{folder}"]
    if parts[0] in ("plugins", "clients"):
        return [] if "tests" in parts else ["/".join(parts[:2])]
    return [parts[0]] if parts[0] in ("benchmarks", "tests") else []


def measure_tracked() -> dict[str, Size]:
    """Return the sizes of all rows of the table."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    sizes: dict[str, Size] = defaultdict(Size)
    for name in listed.stdout.splitlines():
        path = ROOT / name
        rows = groups(name)
        if rows and path.is_file():
            size = measure(path.read_text())
            for row in rows:
                sizes[row].add(size)
    return dict(sizes)


def main() -> int:
    budgets = tomllib.loads(PYPROJECT.read_text())["tool"]["size"]["budgets"]
    sizes = measure_tracked()
    above = []
    print(f"{'':28}{'tokens':>8}{'budget':>8}{'a line':>8}{'lines':>8}")
    for name, size in sorted(sizes.items()):
        budget = budgets.get(name)
        density = size.tokens / max(size.code_lines, 1)
        row = (
            f"{name:28}{size.tokens:>8}{budget or '':>8}{density:>8.1f}{size.lines:>8}"
        )
        if budget and size.tokens > budget:
            above.append(name)
            row += "  above"
        print(row)
    if above:
        print(f"above [tool.size.budgets] of pyproject.toml: {', '.join(above)}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
