"""Damaged files of every kind are read, or refused with a `DcarError`: those that once were not, and new ones.

`TEST_LONG=1 MUTATE_S=300 make test ARGS="-k mutator"` looks for more, for five minutes; what it finds belongs into
tests/corpus once it is mended.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.mutation import CORPUS, KINDS, Source, corpus, damaged, keep, valid_files
from tests.support.parts import needs
from tests.support.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about what is damaged
EACH = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("valid")


def test_the_corpus_has_small_files_of_known_kinds() -> None:
    assert {path.name for path in CORPUS.glob("*")} <= KINDS.keys()
    assert all(len(source.data) < 2**14 for _, source in corpus())


@pytest.mark.parametrize(("name", "source"), [*corpus()], ids=lambda given: given if isinstance(given, str) else "")
def test_what_once_got_through_is_refused(name: str, source: Source, folder: Path) -> None:
    source.read(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind: str, folder: Path) -> None:
    choose, sources = random.Random(0), [each for each in valid_files(folder) if each.kind == kind]
    for number in range(EACH * len(sources)):
        source = sources[number % len(sources)]
        source._replace(data=damaged(source.data, choose)).read(folder)


@needs("time")
def test_the_mutator_finds_nothing(tmp_path: Path) -> None:
    end, seed, said = time.monotonic() + float(os.environ.get("MUTATE_S", "30")), 1, ""
    while (left := end - time.monotonic()) > 0:  # again if a file has ended the process
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.mutation", f"{left}", f"{seed}", f"{tmp_path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said += done.stdout + done.stderr
        if done.returncode:
            said += f"{keep(tmp_path)} ended the reader with status {done.returncode}\n"
        seed += 1
    assert not (tmp_path / "found").exists(), said
    assert "files were read" in said
