"""Jobs that are killed when they flush or rename a file, or write to an object store."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.killing import CASES, library
from tests.support.object_store import ObjectStore
from tests.support.parts import needs


@needs("cc")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=needs("object-store") if "store" in case else ()) for case in CASES]
)
def test_current_names_a_complete_version_whenever_a_job_is_killed(
    case: str, published: Path, tiny_gallery: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_gallery / "circle", tmp_path / "more" / "round")  # other names, other ids
    (folder := tmp_path / "attempts").mkdir()
    given = [case, folder, tiny_gallery, tmp_path / "more", tiny_checkpoint, published]
    with ObjectStore() if "store" in case else nullcontext() as store:
        environment = {**(store.environment if store else {}), "LD_PRELOAD": str(library(tmp_path))}
        command = [sys.executable, "-m", "tests.support.killing", *map(str, given)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" calls\n")
