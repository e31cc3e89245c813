"""Print the lines of Python by folder, and the words of the documents, against their budgets; exit with 1 above them.

    python scripts/size.py    compare the tracked files with [tool.size.budgets] of pyproject.toml

Modules beside the folders of a package count as PACKAGE/*.py. A folder that needs more takes it from another one of its
package, in the same commit.
"""

import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = ROOT / "pyproject.toml"
PACKAGES = ("dcar_core", "index_jobs", "app")


def measure() -> dict[str, int]:
    """Return lines of Python by folder and in all, and the words of the documents."""
    counts = Counter[str]()
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.splitlines():
        path, parts = ROOT / name, name.split("/")
        if not path.is_file():
            continue
        if name == "README.md" or (parts[0] == "docs" and path.suffix == ".md"):
            counts["words of documents"] += len(path.read_text().split())
        elif path.suffix == ".py":
            lines = path.read_bytes().count(b"\n")
            if parts[0] in PACKAGES:
                counts[f"{parts[0]}/{parts[1] if len(parts) > 2 else '*.py'}"] += lines
                counts[parts[0]] += lines
                counts["packages"] += lines
            elif parts[0] in ("plugins", "clients"):
                counts["/".join(parts[:2])] += lines if "tests" not in parts else 0
            elif parts[0] in ("benchmarks", "tests"):
                counts[parts[0]] += lines
    return dict(counts)


def main() -> int:
    budgets = tomllib.loads(PYPROJECT.read_text())["tool"]["size"]["budgets"]
    counts, above = measure(), list[str]()
    print(f"{'':28}{'now':>8}{'budget':>8}")
    for name in sorted(counts.keys() | budgets.keys()):
        now, budget = counts.get(name, 0), budgets.get(name)
        is_above = budget is not None and now > budget
        print(f"{name:28}{now:>8}{budget or '-':>8}{'  above' if is_above else ''}")
        above += [name] if is_above else []
    if above:
        print(f"above [tool.size.budgets] of pyproject.toml: {', '.join(above)}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
