"""Journal of a captioning run: every response is on disk before it is used, so a resumed run repeats no request.

- One JSON object per line: the settings, then responses, rejected drafts and finished images in order of arrival.
- An image is identified by name and content hash, so a replaced image is captioned again.
- An incomplete last line is dropped.
"""

import errno
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dcar_core.captioning.endpoint import USAGE, Completion, Usage
from dcar_core.captioning.questions import Rejection
from dcar_core.util.errors import CaptionError

VERSION = 1


class CaptionedImage(NamedTuple):
    """An image: its name relative to the image directory, its category, and the hash of its content."""

    name: str
    category: str
    sha: str


class CaptionJournal:
    """Append-only journal; `finished` and `usage` include earlier runs.

    Raise CaptionError for a file of other settings, for one that is no journal, and for one that cannot be written.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file = file
        self.finished: dict[tuple[str, str], str] = {}  # (name, hash) -> caption, "" if given up
        self.usage = defaultdict[str, Usage](Counter)
        self.rejected: dict[tuple[str, str, int], dict[str, Any]] = {}  # by image and turn
        self._answers: dict[tuple[str, str, str, int], Completion] = {}
        if file.is_file() and file.stat().st_size > 0:
            self._load(settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._out = file.open("ab", buffering=0)
        if self._out.tell() == 0:
            self._write({"captions": VERSION, "settings": settings})

    def close(self) -> None:
        self._out.close()

    def answer(self, image: CaptionedImage, role: str, turn: int) -> Completion | None:
        return self._answers.get((image.name, image.sha, role, turn))

    def record(
        self, image: CaptionedImage, role: str, turn: int, answer: Completion | None, usage: Usage
    ) -> Completion | None:
        """Record a response, or None for unusable ones, and the tokens of all that were requested for it."""
        spent = [usage[name] for name in USAGE]
        if answer is not None:
            line = {"asked": role, "turn": turn, "text": answer.text, "finish": answer.finish, "usage": spent}
            self._record(line, image)
        elif usage:
            self._record({"asked": role, "wasted": spent}, image)
        return answer

    def reject(self, image: CaptionedImage, turn: int, draft: str, why: Rejection) -> None:
        if (image.name, image.sha, turn) not in self.rejected:
            line = {"rejected": why.reason, "turn": turn, "draft": draft, "feedback": why.feedback}
            self._record(line | {"category": image.category}, image)

    def finish(self, image: CaptionedImage, caption: str) -> None:
        self._record({"finished": caption}, image)

    def rejections(self) -> Iterator[dict[str, Any]]:
        """Iterate over rejected drafts with reasons, in the order of the images."""
        for _, line in sorted(self.rejected.items()):
            named = {name: line[name] for name in ("image", "category", "draft", "feedback")}
            yield named | {"reason": line["rejected"]}

    def _record(self, line: dict[str, Any], image: CaptionedImage) -> None:
        line = {"image": image.name, "sha": image.sha, **line}
        self._write(line)
        self._apply(line)

    def _write(self, line: dict[str, Any]) -> None:
        content = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        try:
            if self._out.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._out.fileno())
        except OSError as error:
            self._out.close()
            raise CaptionError(f"{self.file} cannot be written: {error.strerror}; earlier answers are kept") from error

    def _apply(self, line: dict[str, Any]) -> None:
        image = (line.get("image", ""), line.get("sha", ""))
        if "asked" in line:
            self.usage[line["asked"]].update(dict(zip(USAGE, line.get("usage") or line["wasted"], strict=True)))
        if "text" in line:
            self._answers[(*image, line["asked"], line["turn"])] = Completion(line["text"], line["finish"])
        elif "rejected" in line:
            self.rejected[(*image, line["turn"])] = line
        elif "finished" in line:
            self.finished[image] = line["finished"]

    def _load(self, settings: dict[str, Any]) -> None:
        whole, newline, torn = self.file.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self.file, len(whole) + len(newline))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            before = lines[0]["settings"] if lines else settings
            for line in lines[1:]:
                self._apply(line)
            other = [f"{key} (was {before.get(key)!r:.80})" for key in settings if before.get(key) != settings[key]]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CaptionError(
                f"{self.file} is not a captioning journal ({error}); move it, or give --restart"
            ) from error
        if other:
            raise CaptionError(
                f"{self.file} was made with other settings: {', '.join(other)}; use those, or give another --out or "
                f"--restart"
            )
