"""What an installation without PyTorch can do, and what it says of the rest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import without_pytorch

CHECKPOINT = "examples/emoji/twemoji/checkpoint"


@pytest.mark.parametrize(
    ("command", "feature"),
    [
        (["train", "--data", "DATA", "--out", "OUT", "--model", "examples/emoji/base"], "this command"),
        (["index", "build", "--gallery", "DATA", "--checkpoint", CHECKPOINT, "--out", "OUT"], "loading OUT"),
    ],
    ids=["train", "build"],
)
def test_a_command_names_the_extra_that_it_needs(
    command: list[str], feature: str, tiny_data: Path, tmp_path: Path
) -> None:
    given = [{"DATA": str(tiny_data), "OUT": str(tmp_path / "out")}.get(each, each) for each in command]
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", *given],
        env=os.environ | without_pytorch(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1].replace(str(tmp_path / "out"), "OUT")
    assert message.startswith(f"error: {feature}")
    assert message.endswith("needs an optional dependency: pip install 'dcar[torch]'")
