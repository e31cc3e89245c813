"""Write the lock files: one version and the hashes of every package, for Python 3.11 and newer.

    pip install uv
    python scripts/lock.py                                          write requirements.lock and requirements-ci.lock
    python scripts/lock.py --out my.lock --extra openvino           a lock with other extras
    python scripts/lock.py --check                                  exit with 1 if a lock does not fit pyproject.toml

- PyTorch, torchvision and what only CUDA builds need are left out: their builds and hashes differ between the CPU and
  the CUDA index, and the index is the user's choice. `--torch` includes them.
- `--check` needs neither uv nor a network.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "pyproject.toml"
CI_SCRIPT = ROOT / ".ci" / "run"
OF_TORCH = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.+")
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)


def locks() -> dict[str, tuple[str, ...]]:
    """The lock files of the repository and their extras; those of CI are what its script installs."""
    extras = re.search(r"^export EXTRAS=(\S+)$", CI_SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    if extras is None:
        raise ValueError(f"{CI_SCRIPT} does not set EXTRAS")
    return {"requirements.lock": (), "requirements-ci.lock": tuple(extras[1].split(","))}


def write(path: Path, extras: tuple[str, ...], *, torch: bool, index: str | None) -> None:
    """Resolve with uv and write one lock.

    Raises:
        subprocess.CalledProcessError: uv is missing its index, or the requirements contradict each other.
    """
    words = ["uv", "pip", "compile", str(PROJECT), "--universal", "--python-version", "3.11", "--quiet", "--no-header"]
    words += [word for extra in extras for word in ("--extra", extra)]
    words += ["--index", index] if index else []
    resolved = _output([*words, "--no-annotate"])
    left_out = [] if torch else sorted({name for name, _ in _PINNED.findall(resolved) if OF_TORCH.fullmatch(name)})
    words += [word for name in left_out for word in ("--no-emit-package", name)]
    note = "" if torch else "# Without PyTorch: install it from the index of your choice, after this file.\n"
    head = f"# Written by `python scripts/lock.py`; extras: {', '.join(extras) or 'none'}.\n{note}"
    lines = [line for line in _output([*words, "--generate-hashes"]).splitlines() if line and not line.startswith("#")]
    path.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def _output(words: list[str]) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def requirements(extras: tuple[str, ...]) -> list[Requirement]:
    """The direct requirements in pyproject.toml, with those of some extras."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def faults(path: Path, extras: tuple[str, ...]) -> list[str]:
    """Requirements of pyproject.toml that a lock does not fulfil."""
    pinned: dict[str, list[str]] = {}
    for name, version in _PINNED.findall(path.read_text(encoding="utf-8")):
        pinned.setdefault(canonicalize_name(name), []).append(version)
    found = []
    for requirement in requirements(extras):
        name = canonicalize_name(requirement.name)
        if OF_TORCH.fullmatch(name):
            continue
        versions = pinned.get(name, [])
        if not versions:
            found.append(f"{path.name} lacks {requirement.name}")
        found += [f"{path.name} has {name} {v}, not {requirement.specifier}" for v in versions
                  if not requirement.specifier.contains(v, prereleases=True)]  # fmt: skip
    return found


def main() -> int:
    """Write or check the locks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the locks fit pyproject.toml")
    parser.add_argument("--out", type=Path, help="write this lock alone")
    parser.add_argument("--extra", action="append", default=[], help="an extra for --out; may be repeated")
    parser.add_argument("--torch", action="store_true", help="include PyTorch, as the index has it")
    parser.add_argument("--index", help="a further package index, such as that of PyTorch's CPU builds")
    given = parser.parse_args()
    if given.extra and given.out is None:
        parser.error("--extra is for a lock of your own: give --out as well")
    if given.check:
        found = [fault for name, extras in locks().items() for fault in faults(ROOT / name, extras)]
        print("\n".join([*found, "run `python scripts/lock.py`"] if found else ["the locks fit pyproject.toml"]))
        return int(bool(found))
    wanted = {given.out: tuple(given.extra)} if given.out else {ROOT / name: extras for name, extras in locks().items()}
    for path, extras in wanted.items():
        write(path, extras, torch=given.torch, index=given.index)
        print(f"{path} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
