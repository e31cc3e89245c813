"""How the site of `mkdocs.yml` differs from the pages of docs/, and what no page of it
may do.

- The home page is the repository's README.
- Links to files outside docs/ lead to the repository at `extra.repository`; without
  one, their text remains.
- A page that loads a font, script, style or image of another host ends the build.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
_CODE_OR_LINK = re.compile(
    r"^```.*?^```|\[(?P<text>[^\[\]]*)\]\((?P<path>[^):#\s]+)(?P<anchor>#[^)\s]*)?\)|`[^`\n]+`",
    re.DOTALL | re.MULTILINE,
)
_LOADS = re.compile(
    r"<(?:script|img|source|iframe)\b[^>]*?\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|<link\b(?![^>]*\brel=[\"']?canonical)[^>]*?\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|(?:@import\s*|url\()[\"']?((?:https?:)?//[^\"')\s]+)"
)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    own = Path(page.file.abs_src_path)
    source = README if page.is_homepage else own
    if page.parent is None:
        page.meta["hide"] = ["navigation"]  # of one line

    def adjusted(match: re.Match[str]) -> str:
        if not match["path"]:
            return match[0]
        target = (source.parent / match["path"]).resolve()
        anchor = match["anchor"] or ""
        target = DOCS / "README.md" if target == README else target
        if target.is_relative_to(DOCS):
            return f"[{match['text']}]({os.path.relpath(target, own.parent)}{anchor})"
        repository = config.extra["repository"]
        path = target.relative_to(ROOT)
        if repository:
            return f"[{match['text']}]({repository}/blob/main/{path}{anchor})"
        return match["text"]

    return _CODE_OR_LINK.sub(
        adjusted, README.read_text(encoding="utf-8") if page.is_homepage else markdown
    )


def on_post_build(*, config: Any) -> None:
    for path in Path(config.site_dir).rglob("*"):
        if path.suffix in (".html", ".css") and (
            loads := _LOADS.search(path.read_text(encoding="utf-8"))
        ):
            raise PluginError(f"{path} loads {next(filter(None, loads.groups()))}")
