"""The page on which a person grades results, a key each: one HTML file, without a server.

- Rows of the list without a grade come first, and then the pairs that settle a comparison soonest; see
  `judge.order_unjudged`.
- Texts are from strangers: they enter as JSON without "<" and are shown as text, and the page runs its own script only.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from app.feedback.judge import Run, order_unjudged
from dcar_core.images.decoding import jpeg_data_uri
from dcar_core.util.errors import DcarError

MAX_PAIRS, MAX_BYTES = 1000, 16_000_000  # of a page; bytes of its images
_SIDE = 256  # pixels


def judge_page(runs: Sequence[Run]) -> tuple[str, int]:
    """Return the page, and the number of pairs on it."""
    judged, nowhere = runs[0].judged, set.intersection(*(set(run.missing) for run in runs))
    blank = (pair for pair in judged.blank if pair[1] not in judged.grades[pair[0]] and pair[1] not in nowhere)
    pairs = [*dict.fromkeys([*blank, *order_unjudged(runs)])]
    tasks, items = list[tuple[str, str, str, int]](), list[tuple[str, str]]()
    places, size = dict[str, int](), 0
    for query_id, item in pairs[:MAX_PAIRS]:
        if item not in places:
            places[item] = len(items)
            items.append(_describe(runs, item))
            size += len(items[-1][0])
        if size > MAX_BYTES:
            break
        tasks.append((query_id, judged.texts[query_id], item, places[item]))
    key = hashlib.sha256(json.dumps(tasks).encode()).hexdigest()
    content = {"key": f"dcar-judge-{key[:16]}", "total": len(pairs), "tasks": tasks, "items": items}
    template = (Path(__file__).parent / "judge.html").read_text(encoding="utf-8")
    script = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(content).replace("<", "\\u003c")
    return template.replace("HASH", digest, 1).replace("DATA", text, 1), len(tasks)


def _describe(runs: Sequence[Run], item: str) -> tuple[str, str]:
    """Return the picture of an item as a data URI, "" if it cannot be read, and its caption."""
    for artifact in (run.index.snapshot.artifact for run in runs):
        row = artifact.row_of(item)
        if row is not None:
            try:
                image = jpeg_data_uri(artifact.image_bytes(row), _SIDE)
            except DcarError:
                image = ""
            return image, artifact.item(row).caption
    return "", ""
