"""Make a third style of the bundled emoji, EmojiOne 1, which neither the base model nor any choice has seen.

    npm install --prefix packages @iconify-json/emojione-v1@1.2.3 @iconify-json/twemoji@1.2.5 emojibase-data@17.0.0
    pip install resvg-py
    python benchmarks/third_style.py --packages packages/node_modules --out emojione-v1
    dcar evaluate --data emojione-v1 --model examples/emoji/base --seeds 3 --epochs 5 --amp bfloat16 --lr 2e-3 \\
        --methods clip-adapter,block-adapters,query-prompts --out results/emojione-v1

- Captions, negatives, categories and splits are those of twemoji, for the emoji that the style has.
- The images, CC-BY-SA 4.0, stay outside of the repository.
"""

import json
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from service import ROOT

TWEMOJI = ROOT / "examples" / "emoji" / "twemoji"
SIDE = 64  # pixels, as in the bundled galleries
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
BOX = ("left", "top", "width", "height")
SHORTCODES = ("cldr", "emojibase", "github", "iamcal", "joypixels")


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def names_of_emoji(packages: Path) -> dict[str, str]:
    """Return code points by name, letters and digits alone."""
    pairs = [(name, code) for code, name in read(packages / "@iconify-json/twemoji/chars.json").items()]
    data = packages / "emojibase-data" / "en"
    pairs += [(each["label"], each["hexcode"]) for each in read(data / "data.json")]
    for code, names in (item for file in SHORTCODES for item in read(data / f"shortcodes/{file}.json").items()):
        pairs += [(name, code) for name in ([names] if isinstance(names, str) else names)]
    found = dict[str, str]()
    for name, code in pairs:
        found.setdefault(squash(name), "-".join(part for part in code.lower().split("-") if part != "fe0f"))
    return found


def squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def drawings(packages: Path) -> dict[str, str]:
    """Return the SVG of each emoji of the style by its code points."""
    icons, names, found = read(packages / "@iconify-json/emojione-v1/icons.json"), names_of_emoji(packages), {}
    for name, icon in icons["icons"].items():
        if code := names.get(squash(name)):
            left, top, width, height = ({"left": 0, "top": 0, **icons, **icon}[key] for key in BOX)
            box = f'viewBox="{left} {top} {width} {height}"'
            found.setdefault(code, f"<svg {NAMESPACES} {box}>{icon['body']}</svg>")
    return found


def main() -> None:
    """Write the images, the pairs of each split, and metadata.jsonl."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="node_modules with the packages")
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    args = parser.parse_args()
    import resvg_py

    args.out.mkdir(parents=True)
    found = drawings(args.packages)
    for split in ("train", "val", "test"):
        pairs = {name: pair for name, pair in read(TWEMOJI / f"{split}.json").items() if name in found}
        for name, pair in pairs.items():
            image = resvg_py.svg_to_bytes(svg_string=found[name], width=SIDE, height=SIDE)
            (args.out / pair["file_name"]).write_bytes(bytes(image))
        (args.out / f"{split}.json").write_text(json.dumps(pairs, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{split}: {len(pairs):,} emoji")
    lines = (TWEMOJI / "metadata.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["id"] in found]
    (args.out / "metadata.jsonl").write_text("".join(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
