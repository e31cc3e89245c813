"""The commands of the README: from captions of a vision model to an index that has
them.
"""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vision_server import VisionServer

from app.cli import add_plugins, app
from index_jobs.index.versions import open_current
from tests.support.images import draw
from tests.support.shown import assert_shown, shown_blocks

COLORS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("square", "circle", "triangle", "cross")


def test_captions_of_a_vision_model_reach_the_index(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    add_plugins()
    for number, (shape, color) in enumerate((s, c) for s in SHAPES for c in COLORS):
        (tmp_path / "photos" / shape).mkdir(parents=True, exist_ok=True)
        draw(color, shape).save(tmp_path / "photos" / shape / f"photo {number}.png")
    block, _ = shown_blocks("plugins/dcar-caption/README.md")
    commands = [line for line in block.lines if line.startswith("dcar ")]
    printed = ""
    with VisionServer() as server:
        # 3: one epoch made it no better
        for command, status in zip(commands, ([0], [0, 3], [0]), strict=True):
            words = command.replace(
                "dcar train", f"dcar train --model {tiny_model} --epochs 1"
            )
            words = re.sub(r"--url \S+", f"--url {server.url}", words)
            done = CliRunner().invoke(
                app,
                shlex.split(words)[1:],
                catch_exceptions=False,
            )
            assert done.exit_code in status, (command, done.output)
            printed += done.stdout
    assert_shown(block, printed)
    opened = open_current(tmp_path / "index")
    items = [opened.item(row) for row in range(opened.rows)]
    assert len(items) == len(COLORS) * len(SHAPES)
    assert all(item.caption.startswith(f"A {item.category} on grass") for item in items)
    assert opened.manifest.cutoff, "the validation pairs were found"
