"""The benchmark scripts of indexes run; their figures are for a quiet machine."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.support import commands
from tests.support.paths import ROOT
from tests.support.vectors import clustered

KINDS = (("flat", "Flat"), ("IVF8,Flat", "IVF8,Flat"))


def run(script: str, *arguments: str | Path) -> str:
    done = commands.run(ROOT / "benchmarks" / script, *arguments, environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_index_kinds_takes_vectors_of_a_file_and_more_like_them(tmp_path: Path) -> None:
    """Each target, filter and update has its figures; peers that are not installed are left out."""
    np.save(tmp_path / "v.npy", clustered(200))
    np.save(tmp_path / "q.npy", clustered(100, seed=3))
    files = ("--vectors", tmp_path / "v.npy", "--queries", tmp_path / "q.npy", "--count", "300", "--query-count", "50")
    kinds = ("--kind", "flat", "--kind", "IVF8,Flat")
    tasks = (*kinds, "--filters", "--target", "0.99", "--target", "0.5", "--peers")
    table = run("index_kinds.py", *files, *tasks).splitlines()
    assert table[0].startswith("300 vectors of 32, from v; ")
    rows = [line.strip("| ").split(" | ") for line in table if line.startswith("| `")]
    ours = [row for row in rows if row[0] in ("`flat`", "`IVF8,Flat`")]
    asked = [[f"`{kind}`", f"`{factory}`", target] for kind, factory in KINDS for target in ("0.99", "0.5")]
    assert [row[:3] for row in ours] == asked
    assert float(ours[2][-1]) >= 0.95 > float(ours[3][-1]) >= 0.5
    for row in ours:
        assert all(float(filtered.rsplit(", ")[1]) >= 0.9 for filtered in row[-4:-1])


@pytest.mark.slow
def test_other_benchmarks_print_their_tables(tmp_path: Path) -> None:
    size = ("--count", "300", "--query-count", "100", "--out", tmp_path)
    table = run("index_kinds.py", *size, "--kind", "flat", "--kind", "auto")
    assert "`auto` takes `Flat`: 300 vectors are at most 20,000" in table
    kept = run("index_kinds.py", *size, "--kind", "IVF8,Flat", "--filters")
    assert all(f"\n| `{kind}` |" in kept for kind in ("flat", "IVF8,Flat")), "from the results that are kept"
    assert " | 1 % allowed | " in kept  # though the first row has no such figure
    told = run("encode.py", "--memory", "60", "--threads", "1")
    assert re.search(r"scanned 60 pictures; the table takes \d+ MiB, \d\d\d bytes a picture", told)
    assert re.search(r"encoded 60 pictures, \d+/s; peak \d+ MiB, \d+ MiB in a worker", told)
