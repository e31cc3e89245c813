"""Write the table of docs/models.md from open_clip's configurations.

    python scripts/generate_models_page.py            write the page
    python scripts/generate_models_page.py --check    exit with 1 if it is stale

The text above the mark is written by hand and stays; everything below it is replaced.
Parameters of models that parameters.json lacks are counted first; RoBERTa, mT5 and NLLB
need the hub for that.
"""

import argparse
import json
import sys
from pathlib import Path

import open_clip
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT))

from dcar_core.model.catalogue import (  # noqa: E402
    PARAMETERS,
    SOURCES,
    list_recommended,
)

MARK = (
    "<!-- Generated below by scripts/generate_models_page.py. Run `make reference`"
    " after an update of open_clip. -->"
)


def page(text: str) -> str:
    """Return the page with its table replaced."""
    return text.partition(MARK)[0] + "\n\n".join([MARK, _recommended()]) + "\n"


def _recommended() -> str:
    rows = [
        "| model | COCO | stated by | M | GFLOP per image | licence | for |",
        f"|{7 * ' --- |'}",
    ]
    for each, entry in list_recommended().items():
        figures = (
            f"{each.coco or '-'} | [{each.source}]({SOURCES[each.source]}) |"
            f" {entry.parameters} | {each.gflops}"
        )
        rows.append(f"| `{each.name}` | {figures} | {each.licence} | {each.use} |")
    note = (
        "COCO: zero-shot text-to-image R@1 in percent, as published, not measured"
        " here.\n`dcar models --recommend` names the weights."
    )
    return "\n\n".join(["## Recommended", note, "\n".join(rows)])


def count_parameters(name: str) -> int:
    """Return the millions of parameters of a built-in model, built without its
    memory.
    """
    with torch.device("meta"):
        model = open_clip.create_model(
            name,
            load_weights=False,
            pretrained_text=False,
            device="meta",
        )
    return round(sum(int(parameter.numel()) for parameter in model.parameters()) / 1e6)


def add_counts() -> None:
    """Count the parameters of the models that are new in open_clip."""
    known = json.loads(PARAMETERS.read_text(encoding="utf-8"))
    counts = {
        name: known.get(name) or count_parameters(name)
        for name in open_clip.list_models()
    }
    PARAMETERS.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Write the page, or check it; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only say whether the page is up to date",
    )
    check = parser.parse_args().check
    if not check:
        add_counts()
    text = PAGE.read_text(encoding="utf-8")
    current = page(text)
    if current == text:
        return 0
    if not check:
        PAGE.write_text(current, encoding="utf-8")
    print(
        f"{PAGE.relative_to(ROOT)}"
        f" {'is stale; run `make reference`' if check else 'written'}"
    )
    return int(check)


if __name__ == "__main__":
    sys.exit(main())
