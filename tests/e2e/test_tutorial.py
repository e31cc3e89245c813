"""The commands of docs/tutorial.md, run in order in a fresh directory."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from app.cli import app
from tests.support.commands import Command
from tests.support.images import draw
from tests.support.paths import ROOT
from tests.support.processes import free_port

MODEL = "--model ViT-B-32-quickgelu --pretrained openai"
SPEED = "--epochs 2 --batch-size 64"
COLORS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("square", "circle", "triangle", "cross")
BACKGROUNDS = {"white": (255, 255, 255), "grey": (160, 160, 160), "yellow": (250, 240, 120)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """72 images in one folder per category, with pairs.csv in the columns that the tutorial shows."""
    folder = tmp_path / "photos"
    rows = []
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
        for color in COLORS:
            for background, rgb in BACKGROUNDS.items():
                pixels = np.array(draw(color, shape))
                pixels[(pixels == 255).all(-1)] = rgb
                name = f"{shape}/{color}-{background}.png"
                Image.fromarray(pixels).save(folder / name)
                rows.append((name, f"a {color} {shape} on a {background} background", shape))
    header = re.search(r"```csv\n(.+)\n", tutorial())
    assert header
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header[1].split(","), *rows])
    return folder


def tutorial() -> str:
    return (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The shell commands of the page, one per block."""
    return [block.strip() for block in re.findall(r"```sh\n(.*?)```", tutorial(), re.DOTALL)]


def run(command: str, *, statuses: tuple[int, ...] = (0,)) -> str:
    """Run a `dcar` command in this process and return its output."""
    result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
    assert result.exit_code in statuses, (command, result.output)
    return result.stdout


@contextmanager
def server(command: str) -> Iterator[str]:
    """The tutorial's `dcar serve` on a free port; gives its address."""
    port = free_port()
    words = [*shlex.split(command)[1:], "--port", port]
    process = Command("app.cli", *words, directory=Path.cwd(), stdout=os.devnull, stderr=os.devnull)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -15)


def curl(command: str) -> dict[str, Any]:
    """Run a curl command, again until the server is up."""
    deadline = time.monotonic() + 60
    while True:
        done = subprocess.run([*shlex.split(command), "--fail"], capture_output=True, text=True)
        if done.returncode == 0 or time.monotonic() > deadline:
            assert done.returncode == 0, (command, done.stderr)
            response: dict[str, object] = json.loads(done.stdout)
            return response
        time.sleep(0.2)


def test_the_tutorial_has_ten_commands() -> None:
    heads = re.findall(r"^## (\d+)\. ", tutorial(), re.MULTILINE)
    assert heads == [str(number) for number in range(1, 11)]
    assert len(commands()) == 10
    assert commands()[0].startswith("make install")
    assert "tests/e2e/test_tutorial.py" in tutorial()


def test_the_tutorial_ends_with_the_table(photos: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    _install, check, zero_shot, index, search, train, index_adapted, serve, ask, evaluate = (
        command.replace(MODEL, f"--model {tiny_model}") for command in commands()
    )
    assert "72 pairs" not in run(check), "the pairs are split"
    run(zero_shot)
    assert "version 1 published: 72" in run(index)
    assert len(run(search).splitlines()) == 3
    trained = run(f"{train} {SPEED}", statuses=(0, 3))  # 3: two epochs made the tiny model no better
    assert "untouched model" in trained
    assert "Was it worth it? " in trained
    assert "validation pairs decide little" in trained
    assert "version 1 published: 72" in run(index_adapted)
    with server(serve) as address:
        response = curl(ask.replace("http://127.0.0.1:8000", address))
        assert len(response["results"]) == 3
        plain = curl(ask.replace("http://127.0.0.1:8000", f"{address}/collections/clip"))
        assert len(plain["results"]) == 3
    table = run(f"{evaluate} {SPEED}")
    assert re.search(r"^\| clip \| +\d+\.\d \|", table, re.MULTILINE)
    assert re.search(r"^\| block-adapters \| +\d+\.\d ± \d+\.\d \|", table, re.MULTILINE), table
    assert (photos.parent / "results" / "report.html").is_file()
