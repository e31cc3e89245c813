"""Rules of the house that a machine can keep."""

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("dcar_core", "index_jobs", "app")


def modules(room: str) -> list[Path]:
    return [path for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"]


def test_open_clip_is_imported_in_one_place() -> None:
    importers = {
        p.name
        for room in ROOMS
        for p in modules(room)
        if re.search(r"^\s*(import|from) open_clip", p.read_text(), re.M)
    }
    assert importers == {"backbone.py"}


def test_the_readme_tree_is_that_of_the_modules() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("\npyproject.toml ") : readme.index("\n```\n", readme.index("\npyproject.toml "))]
    shown, above = set[str](), list[str]()
    for line in tree.strip().splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [name]
        if name.endswith(".py"):
            shown.add("".join(above))
    assert shown == {path.relative_to(ROOT).as_posix() for room in ROOMS for path in modules(room)}


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
