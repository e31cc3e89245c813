"""Print the lines of Python by folder, and the words of the documents, against their budgets; exit with 1 above them.

    python scripts/size.py            compare the tracked files with [tool.size] of pyproject.toml
    python scripts/size.py --lower    lower the limits of [tool.size.ratchet] to the tree as it is

- A budget is what a folder may have in the end. Modules beside the folders of a package count as PACKAGE/*.py.
- While `enforced` is false, a folder may be above its budget but not above its ratchet: it shrinks or stays.
"""

import re
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
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
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
    config = tomllib.loads(PYPROJECT.read_text())["tool"]["size"]
    counts, budgets, ratchet, faults = measure(), config["budgets"], config["ratchet"], list[str]()
    if "--lower" in sys.argv:
        rows = "".join(f'"{name}" = {counts[name]}\n' for name in sorted(counts))
        text = re.sub(r"(?<=\[tool\.size\.ratchet\]\n)(?:\".*\n)*", rows, PYPROJECT.read_text())
        PYPROJECT.write_text(text)
        return 0
    print(f"{'':28}{'now':>8}{'budget':>8}{'most':>8}")
    for name in sorted(counts.keys() | budgets.keys()):
        now, budget = counts.get(name, 0), budgets.get(name)
        most = budget if config["enforced"] else max(ratchet.get(name, 0), budget or 0)
        is_above = most is not None and now > most
        print(f"{name:28}{now:>8}{budget or '-':>8}{most or '-':>8}{'  above' if is_above else ''}")
        if is_above:
            faults.append(name)
    if faults:
        print(f"above the limits of [tool.size] in pyproject.toml: {', '.join(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
