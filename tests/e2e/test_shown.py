"""The commands of the tutorial and of the how-to guides print what the pages show.

- The tutorial runs first, in a fresh directory with 72 drawn pictures. Each guide
  continues in a copy of it.
- A tiny model and short trainings take the place of CLIP and of real ones.
- Requests to the demo are in `test_example.py`.
"""

import csv
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from app.cli import app
from tests.support import commands
from tests.support.images import draw
from tests.support.page import ready
from tests.support.paths import ROOT
from tests.support.processes import free_port
from tests.support.shown import Shown, assert_shown, shown_blocks

TRAIN = "--epochs 10 --lr 0.005 --batch-size 16"
EVALUATE = "--epochs 2 --batch-size 64"
KEY = "dcar_" + "a" * 43
HASH = hashlib.sha256(KEY.encode()).hexdigest()
BIRDS = {
    "barn owl": "square",
    "kestrel": "circle",
    "robin": "triangle",
    "wren": "cross",
}
COLORS = {
    "red": "at dusk",
    "green": "on a branch",
    "blue": "in flight",
    "orange": "at sunrise",
    "purple": "on a fence post",
    "black": "at night",
}
GROUNDS = {
    (255, 255, 255): "in the snow",
    (160, 160, 160): "in the fog",
    (250, 240, 120): "in a field",
}
ELSEWHERE = {"search.md", "re-rank-and-explain.md"}  # the tests named above


def runs(block: Shown) -> bool:
    """Whether a block is run here. `make` runs this very test, and another one runs
    `make demo`.
    """
    return (
        not block.needs
        and not block.is_silent
        and not block.lines[0].startswith("make ")
    )


GUIDES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
WALKED = [
    "README.md",
    *(
        path.relative_to(ROOT).as_posix()
        for path in GUIDES
        if path.name not in ELSEWHERE
    ),
]
WALKED = [page for page in WALKED if any(map(runs, shown_blocks(page)))]
# they train, so they begin with the photos only
FRESH = {"README.md", "docs/how-to/adapt.md"}


def draw_photos(folder: Path) -> None:
    """72 pictures in one folder per category, with pairs.csv in the columns that the
    tutorial shows.
    """
    rows = []
    for bird, shape in BIRDS.items():
        (folder / bird).mkdir(parents=True)
        looks = list(product(COLORS, GROUNDS))
        for number, (color, ground) in enumerate(looks, 1):
            pixels = np.array(draw(color, shape))
            pixels[(pixels == 255).all(-1)] = ground
            name = f"{bird}/{number:03}.jpg"
            Image.fromarray(pixels).save(folder / name)
            rows.append((name, f"a {bird} {COLORS[color]} {GROUNDS[ground]}", bird))
    header = (
        (ROOT / "docs" / "tutorial.md")
        .read_text(encoding="utf-8")
        .split("```csv\n")[1]
        .splitlines()[0]
    )
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


class Reader:
    """Runs the blocks of a page as a reader does: in the current directory, with a
    service that keeps running.
    """

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._model = model
        self._monkeypatch = monkeypatch
        self._server: commands.Command | None = None
        self._address = ""

    def read(self, block: Shown) -> None:
        """Run the commands of a block, and compare what they print with what the page
        shows.
        """
        printed = "".join(self._run(line) for line in block.lines)
        if not block.is_silent:
            printed = printed.replace(str(self._model), "ViT-B-32")
            assert_shown(
                block,
                printed.replace(self._address or "no service", "http://127.0.0.1:8000"),
            )

    def close(self) -> None:
        """Stop the service."""
        if self._server:
            self._server.send_signal(signal.SIGTERM)
            assert self._server.wait(30) in (0, -15)
            self._server = None

    def _run(self, line: str) -> str:
        line = (
            line.replace("<sha256>", HASH)
            .replace("KEY=dcar_...", f"KEY={KEY}")
            .removeprefix(".venv/bin/")
        )
        words = shlex.split(line, comments=True)
        if line.startswith("export "):
            for word in words[1:]:
                self._monkeypatch.setenv(*word.split("=", 1))
        elif line.startswith("dcar serve"):
            return self._serve(words)
        elif line.startswith("dcar "):
            return self._dcar(line)
        elif line.startswith("python "):
            program = words[2] if words[1] == "-m" else ROOT / words[1]
            rest = [
                word
                for word in words[3 if words[1] == "-m" else 2 :]
                if "*" not in word
            ]
            done = commands.run(
                program,
                *rest,
                directory=Path.cwd() if words[1] == "-m" else ROOT,
            )
            assert done.returncode == 0, (line, done.stderr)
            return done.stdout
        elif line.startswith("curl "):
            line = line.replace("http://127.0.0.1:8000", self._address).replace(
                "$KEY", KEY
            )
            return (
                subprocess.run(
                    shlex.split(line),
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
                + "\n"
            )
        else:
            assert Shown((line,), None, is_json=False).is_silent, (
                f"unknown command {line}"
            )
        return ""

    def _dcar(self, line: str) -> str:
        if line.startswith(("dcar train", "dcar evaluate")):
            line += f" {TRAIN if line.startswith('dcar train') else EVALUATE}"
        if line.startswith("dcar quickstart"):
            self._monkeypatch.setattr(
                "app.cli.serving.serve_index", lambda **flags: None
            )
        if line.startswith(
            ("dcar train", "dcar evaluate", "dcar zero-shot", "dcar quickstart")
        ):
            line += f" --model {self._model}"
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, (line, done.output)
        return done.stdout

    def _serve(self, words: list[str]) -> str:
        """Start the service on a free port, and return the first lines of its log."""
        self.close()
        port = free_port()
        log = Path("serve.log").absolute()
        log.write_text("")
        streams: dict[str, Any] = {
            "stdout": os.devnull,
            "stderr": log,
            "directory": Path.cwd(),
        }
        self._server = commands.Command(
            "app.cli",
            *words[1:],
            "--port",
            port,
            **streams,
        )
        self._address = ready(f"http://127.0.0.1:{port}")
        lines = log.read_text().splitlines(keepends=True)
        return "".join(
            line
            for line in lines
            if "listening on" in line or "serving version" in line
        )


@pytest.fixture(scope="module")
def walked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a reader at the end of the tutorial, and one more photo."""
    folder = tmp_path_factory.mktemp("reader")
    draw_photos(folder / "photos")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        reader = Reader(tiny_model, monkeypatch)
        try:
            for block in shown_blocks("docs/tutorial.md"):
                reader.read(block)
        finally:
            reader.close()
    assert (folder / "results" / "results.md").is_file()
    (folder / "new-photos" / "wren").mkdir(parents=True)
    draw("pink", "cross").save(folder / "new-photos" / "wren" / "101.jpg")
    guide = (ROOT / "docs/how-to/update-and-roll-back.md").read_text("utf-8")
    (folder / "prices.csv").write_text(guide.split("```csv\n")[1].split("```")[0])
    return folder


@pytest.fixture
def reader(
    walked: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Reader]:
    shutil.copytree(walked, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    reader = Reader(tiny_model, monkeypatch)
    yield reader
    reader.close()


def test_the_tutorial_has_ten_commands_and_prints_what_it_shows(walked: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d+)\. ", text, re.MULTILINE) == [
        str(number) for number in range(1, 11)
    ]
    assert len(shown_blocks("docs/tutorial.md")) == 10
    assert "tests/e2e/test_shown.py" in text


@pytest.mark.parametrize("page", WALKED)
def test_the_commands_of_a_guide_print_what_it_shows(
    reader: Reader,
    tmp_path: Path,
    page: str,
) -> None:
    if page in FRESH:
        for name in ("adapted", "index", "index-clip"):
            shutil.rmtree(tmp_path / name)
    requests_to_the_demo = page == "README.md"
    for block in shown_blocks(page):
        is_request = block.lines[0].startswith("curl ")
        if (runs(block) or block.is_silent) and not (
            is_request and requests_to_the_demo
        ):
            reader.read(block)
