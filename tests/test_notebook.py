"""The notebook of examples/: what it keeps is what it shows when it runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.parts import needs
from tests.support.paths import ROOT

NOTEBOOK = ROOT / "examples" / "own-photos.ipynb"


def outputs(path: Path) -> list[dict[str, Any]]:
    cells = [
        cell
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)], (
        f"{path}: run all cells in order"
    )
    return [output for cell in cells for output in cell["outputs"]]


@pytest.mark.parametrize(
    "made",
    [False, pytest.param(True, marks=needs("notebook"))],
    ids=["kept", "made"],
)
@pytest.mark.timeout(600)
def test_the_notebook_shows_pictures_a_plot_and_a_gain_beyond_chance(
    made: bool, tmp_path: Path
) -> None:
    path = NOTEBOOK
    if made:
        path = Path(shutil.copy(NOTEBOOK, tmp_path))
        execute = Path(sys.executable).with_name("jupyter-execute")
        subprocess.run(
            [execute, "--inplace", path],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
        )
    assert path.stat().st_size < 2e6
    shown = outputs(path)
    assert {output["output_type"] for output in shown} == {
        "stream",
        "display_data",
        "execute_result",
    }
    assert sum("image/png" in output.get("data", {}) for output in shown) == 1
    rows = [
        output
        for output in shown
        if "<td>" in "".join(output.get("data", {}).get("text/html", ""))
    ]
    assert len(rows) == 2
    said = "".join(line for output in shown for line in output.get("text", ""))
    (low,) = re.findall(r"difference .* points \(([+-][\d.]+) to", said)
    assert float(low) > 0
