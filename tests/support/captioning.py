"""Photos to be captioned, and how a test asks for it."""

import json
from pathlib import Path
from typing import Any

from dcar_core.captioning.options import CaptioningResult, CaptionOptions, VisionModel
from dcar_core.captioning.questions import QUESTION_TEMPLATES
from dcar_core.captioning.run import caption_images
from tests.support.vision_server import VisionServer

KEY = "sk-very-secret"


def ask(
    photos: Path, server: VisionServer, out: Path | None = None, *, judge: bool = True, **given: Any
) -> CaptioningResult:
    model = {k: given.pop(k) for k in ("key", "price") if k in given}
    restart = given.pop("restart", False)
    drafter = VisionModel(url=server.url, name="small", **model)
    usual: dict[str, Any] = {"dataset": "animals", "templates": QUESTION_TEMPLATES, "tries": 2}
    options = CaptionOptions(**usual | {"timeout_s": 20.0, "concurrency": 2} | given)
    out = out or photos.parent / "captions.json"
    return caption_images(photos, out, drafter, drafter if judge else None, options, restart=restart)


def captions(photos: Path) -> dict[str, Any]:
    return json.loads((photos.parent / "captions.json").read_text())


def rejected(photos: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (photos.parent / "captions.rejected.jsonl").read_text().splitlines()]


def one_image(photos: Path) -> Path:
    """Delete all images but one, so requests have one order."""
    for path in sorted(photos.rglob("*.png"))[1:]:
        path.unlink()
    return photos
