"""Every answer of a captioning run, on disk before it is used: a run that was killed asks nothing twice.

One JSON object a line: first the run's settings, then answers, rejected drafts and finished pictures as they came. A
picture is its name and the hash of its bytes, so a picture that was replaced is asked for anew. A last line that was
cut off by a kill is dropped.
"""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

from dcar_core.captioning.endpoint import Completion
from dcar_core.captioning.filters import Rejection
from dcar_core.captioning.options import TokenUsage
from dcar_core.util.errors import CaptionError

VERSION = 1


class CaptionedImage(NamedTuple):
    """A picture of a category: its name below the images, and the hash of its bytes."""

    image: str
    category: str
    sha: str


class CaptionJournal:
    """Append-only; `finished` and `usage` hold what earlier runs did too.

    Raises:
        CaptionError: it is of a run with other settings, no journal at all, or cannot be written.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file = file
        self.finished: dict[tuple[str, str], str] = {}  # picture -> its caption, or "" for one that was given up
        self.usage: dict[str, TokenUsage] = {}
        self._answers: dict[tuple[str, str, str, int], Completion] = {}
        self._rejected: dict[tuple[str, str, int], dict[str, Any]] = {}
        started = file.is_file() and file.stat().st_size > 0
        if started:
            self._load(settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._out = file.open("ab", buffering=0)
        if self._out.tell() == 0:
            self._write({"captions": VERSION, "settings": settings})

    def close(self) -> None:
        self._out.close()

    def answer(self, picture: CaptionedImage, asked: str, turn: int) -> Completion | None:
        """What was answered before."""
        return self._answers.get((picture.image, picture.sha, asked, turn))

    def answered(self, picture: CaptionedImage, asked: str, turn: int, answer: Completion) -> None:
        line = {"asked": asked, "turn": turn, "text": answer.text, "finish": answer.finish}
        self._note(picture, line | {"usage": list(astuple(answer.usage))})

    def wasted(self, asked: str, usage: TokenUsage) -> None:
        """What was paid for answers that could not be used."""
        if usage.requests:
            self._apply_and_write({"asked": asked, "wasted": list(astuple(usage))})

    def rejected(self, picture: CaptionedImage, turn: int, draft: str, why: Rejection) -> None:
        if (picture.image, picture.sha, turn) not in self._rejected:
            line = {"rejected": why.reason, "turn": turn, "draft": draft, "feedback": why.feedback}
            self._note(picture, line | {"category": picture.category})

    def finish(self, picture: CaptionedImage, caption: str) -> None:
        self._note(picture, {"finished": caption})

    @property
    def rejected_drafts(self) -> int:
        return len(self._rejected)

    def latest(self) -> dict[str, str]:
        """The caption of every finished picture by its name, "" for one that was given up."""
        return {image: said for (image, _), said in self.finished.items()}

    def rejections(self) -> Iterator[dict[str, Any]]:
        """Every rejected draft with its reason, in the order of the pictures."""
        for _, line in sorted(self._rejected.items()):
            yield {
                "image": line["image"],
                "category": line["category"],
                "draft": line["draft"],
                "reason": line["rejected"],
                "feedback": line["feedback"],
            }

    def _note(self, picture: CaptionedImage, line: dict[str, Any]) -> None:
        self._apply_and_write({"image": picture.image, "sha": picture.sha, **line})

    def _apply_and_write(self, line: dict[str, Any]) -> None:
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
            raise CaptionError(f"{self.file} cannot be written: {error.strerror}; what was answered is kept") from error

    def _apply(self, line: dict[str, Any]) -> None:
        picture = (line.get("image", ""), line.get("sha", ""))
        if "wasted" in line:
            self.usage.setdefault(line["asked"], TokenUsage()).add(TokenUsage(*line["wasted"]))
        elif "asked" in line:
            answer = Completion(line["text"], line["finish"], TokenUsage(*line["usage"]))
            self._answers[(*picture, line["asked"], line["turn"])] = answer
            self.usage.setdefault(line["asked"], TokenUsage()).add(answer.usage)
        elif "rejected" in line:
            self._rejected[(*picture, line["turn"])] = line
        elif "finished" in line:
            self.finished[picture] = line["finished"]

    def _load(self, settings: dict[str, Any]) -> None:
        content = self.file.read_bytes()
        whole, newline, torn = content.rpartition(b"\n")
        if torn:
            os.truncate(self.file, len(whole) + len(newline))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            before = lines[0]["settings"] if lines else settings
            for line in lines[1:]:
                self._apply(line)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CaptionError(
                f"{self.file} is no journal of captions ({error}); move it, or give --restart"
            ) from error
        other = [name for name in settings if before.get(name) != settings[name]]
        if other:
            changed = ", ".join(f"{name} (was {before.get(name)!r:.80})" for name in other)
            raise CaptionError(
                f"{self.file} is of a run with another {changed}; give the same again, another --out, or --restart"
            )
