"""Images to add to an index, and the items that a search of it finds."""

import json
from pathlib import Path

import numpy as np

from index_jobs.index.index_version import IndexVersion
from tests.support.images import draw


def write_images(path: Path, *colors: str, shape: str = "square", **fields: object) -> Path:
    """Write a gallery with one image per colour."""
    path.mkdir()
    lines = []
    for color in colors:
        draw(color, shape).save(path / f"{color}.png")
        given = {"file_name": f"{color}.png", "id": color, "caption": f"a {color} {shape}", "color": color}
        lines.append(json.dumps(given | fields) + "\n")
    (path / "metadata.jsonl").write_text("".join(lines))
    return path


def nearest_ids(artifact: IndexVersion, vectors: np.ndarray) -> list[str]:
    return [artifact.item(int(row)).id for row in artifact.search(vectors, 1)[1][:, 0]]
