"""Commands of the documentation, and the output that a page shows below each.

- A block ```sh that is followed by a block ```text or ```json shows what its commands
  print to stdout.
- In shown text, numbers stand for any number, `...` for any rest of a line, and a line
  `...` for any lines.
- In shown JSON, numbers stand for any number, "..." for any value, and `...` at the end
  of an object or list for further members.
- A first line `# Needs ...` marks commands that need a hub, a GPU, a cloud or another
  machine; they are not run.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from tests.support.paths import ROOT

BLOCK = re.compile(
    r"^```sh\n(?P<commands>.*?)^```\n+(?:^```(?P<kind>text|json)\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)
SILENT = (
    "#",
    "pip ",
    "apt-get ",
    "export ",
    ". ",
    "cd ",
    "python -m venv ",
    "make install",
)
"""Starts of lines that print nothing of ours."""


@dataclass(frozen=True)
class Shown:
    """A block of commands: the lines, and the output that the page shows; None for
    none.
    """

    lines: tuple[str, ...]
    output: str | None
    is_json: bool

    @property
    def needs(self) -> str:
        """What the commands need that a test lacks, or ""."""
        if self.lines[0].startswith("# Needs "):
            return self.lines[0].removeprefix("# Needs ")
        return ""

    @property
    def is_silent(self) -> bool:
        """Whether no command prints anything of ours."""
        return all(line.startswith(SILENT) for line in self.lines)


def shown_blocks(page: str) -> list[Shown]:
    """Return the blocks of commands of a page, such as "docs/tutorial.md"."""
    return [
        Shown(
            tuple(filter(None, block["commands"].replace("\\\n", " ").splitlines())),
            block["output"],
            block["kind"] == "json",
        )
        for block in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))
    ]


def assert_shown(block: Shown, printed: str) -> None:
    """Fail unless the commands printed what the page shows."""
    assert block.output is not None, block.lines
    if block.is_json:
        expected = _parse(_close(block.output))
        found = _parse(printed)
        assert (wrong := _differs(expected, found, "")) is None, (
            f"{block.lines}: {wrong} in\n{printed[:2000]}"
        )
    else:
        assert_text(block.output, printed)


def assert_text(shown: str, printed: str) -> None:
    """Fail unless the text is what a page shows."""
    assert re.fullmatch(_pattern(shown), printed.strip() + "\n"), (
        f"shown:\n{shown}\nprinted:\n{printed}"
    )


NUMBER = r"\b[0-9a-f]{8,}\b|[-+]?\d(?:[\d.,]*\d)?"  # or the digits of a hash


def _pattern(shown: str) -> str:
    """Return the regular expression of a shown text."""
    pattern = ""
    for line in shown.strip().splitlines():
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
            continue
        parts = [_literal(part) for part in line.split("...")]
        pattern += "[^\n]*".join(parts) + r"[^\S\n]*\n"
    return pattern


def _literal(text: str) -> str:
    """Escape a text, but for numbers and white space."""
    pieces = re.split(rf"({NUMBER}|\s+)", text)
    return "".join(
        (
            f"(?:{NUMBER})"
            if re.fullmatch(NUMBER, piece)
            else r"[^\S\n]+"
            if piece.isspace()
            else re.escape(piece)
        )
        for piece in pieces
    )


def _close(shown: str) -> str:
    """Return JSON: `...` at the end of an object becomes the key "...", that of a list
    the member "...".
    """
    text = re.sub(r"([{,])\s*\.\.\.\s*}", r'\1 "...": 0}', shown)
    return re.sub(r"([\[,])\s*\.\.\.\s*\]", r'\1 "..."]', text)


def _parse(text: str) -> list[Any]:
    """Parse the JSON values of several commands, one after the other."""
    found = []
    text = text.strip()
    while text:
        value, end = json.JSONDecoder().raw_decode(text)
        found.append(value)
        text = text[end:].strip()
    return found


def _differs(shown: Any, found: Any, place: str) -> str | None:
    """Return the first difference in shape, or None."""
    pairs: list[tuple[Any, Any, Any]] = []
    if shown == "...":
        return None
    if isinstance(shown, dict) and isinstance(found, dict):
        missing = shown.keys() - found.keys() - {"..."}
        more = found.keys() - shown.keys()
        if missing or (more and "..." not in shown):
            return f"{place}: missing {sorted(missing)}, not shown {sorted(more)}"
        pairs = [(key, shown[key], found[key]) for key in shown if key != "..."]
    elif isinstance(shown, list) and isinstance(found, list):
        members = [each for each in shown if each != "..."]
        if len(found) < len(members) or (
            len(found) > len(members) and members == shown
        ):
            return f"{place}: {len(found)} members"
        pairs = [
            (number, *pair)
            for number, pair in enumerate(zip(members, found, strict=False))
        ]
    elif isinstance(shown, (int, float)) and not isinstance(shown, bool):
        is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
        return None if is_number else f"{place}: {found!r} is no number"
    elif isinstance(shown, str) and isinstance(found, str):
        pattern = ".*".join(map(re.escape, shown.split("...")))
        return None if re.fullmatch(pattern, found) else f"{place}: {found!r}"
    else:
        return None if shown == found else f"{place}: {found!r}"
    return next(
        (
            wrong
            for key, one, other in pairs
            if (wrong := _differs(one, other, f"{place}/{key}"))
        ),
        None,
    )
