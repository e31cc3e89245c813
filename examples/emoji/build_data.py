"""Rebuild the emoji example's data from the npm packages that package.json pins.

    python examples/emoji/build_data.py

Needs Node.js 20 or newer with npm, and takes about two minutes. Renders every vendor
style as PNG to build/renders, which train_base.py reads, and writes for each domain
(twemoji and openmoji):

    gallery.tar                       every image of the style, palette PNG, 64 px
    metadata.jsonl                    one line per image: caption, category,
                                      meta-category, attributes, split
    train.json val.json test.json     the pairs in FDRD's form, with swapped negatives;
                                      in train.json each image has a short caption too,
                                      and lists the short captions that are true of it

- Emoji are split by the base emoji, so all skin tones of an emoji are in the same
  split. A style may draw two emoji alike: pairs of train and val whose image, byte for
  byte, is in a later split are left out.
- Negatives of training pairs come from training emoji alone, so no method reads a
  caption of another split.
- The output has the same bytes every time. A killed run resumes with the images that
  are missing.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

from captions import (
    domain_caption,
    facts,
    plain_label,
    short_caption,
    split_of,
    spoken_caption,
    tone_words,
    useful_tags,
)
from PIL import Image

HERE = Path(__file__).parent
DOMAINS = ("twemoji", "openmoji")
# the splits that the negatives of a split may come from
SOURCES = {
    "train": {"train"},
    "val": {"train", "val"},
    "test": {"train", "val", "test"},
}
COLORS = 64
GENDERS = {0: "woman", 1: "man"}


def render(renders: Path) -> None:
    """Render every vendor style as PNG, with Node.js."""
    for command in (
        ["npm", "ci", "--no-fund", "--no-audit"],
        ["node", "render.mjs", str(renders.resolve())],
    ):
        if subprocess.run(command, cwd=HERE, stdout=subprocess.DEVNULL).returncode:
            sys.exit(
                f"`{' '.join(command)}` failed; Node.js 20 or newer and npm are needed"
            )


def write_gallery(renders: Path, domain: str, names: list[str]) -> None:
    """Write gallery.tar without times and owners. Palette images keep 4,000 of them
    below 8 MB.
    """
    part = HERE / domain / "gallery.tar.part"
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            image = Image.open(renders / domain / f"{name}.png").convert("RGBA")
            buffer = io.BytesIO()
            image.quantize(COLORS, method=Image.Quantize.FASTOCTREE).save(
                buffer,
                "PNG",
                optimize=True,
            )
            member = tarfile.TarInfo(f"{name}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    part.replace(HERE / domain / "gallery.tar")


def negatives(
    name: str,
    emoji: dict,
    siblings: dict,
    rng: random.Random,
) -> list[tuple[str, str]]:
    """Return negatives as (caption, category): two other emoji of the subgroup, then
    one with other attributes.
    """
    own = emoji[name]
    sources = SOURCES[split_of(own["base"])]
    allowed = [
        k for k in siblings[own["subgroup"]] if split_of(emoji[k]["base"]) in sources
    ]
    others = [k for k in allowed if emoji[k]["base"] != own["base"]]
    swapped = [
        (domain_caption(emoji[k]), plain_label(emoji[k]["base_label"]))
        for k in rng.sample(others, min(2, len(others)))
    ]
    category = plain_label(own["base_label"])
    toned = [
        k
        for k in siblings[own["subgroup"]]
        if emoji[k]["base"] == own["base"] and k != name
    ]
    if toned:
        swapped.append((domain_caption(emoji[rng.choice(toned)]), category))
    elif others:
        tags = useful_tags(emoji[rng.choice(others)])[:4]
        swapped.append((", ".join([plain_label(own["label"]), *tags]), category))
    caption = domain_caption(own)
    return [pair for pair in swapped if pair[0] != caption]


def add_short_captions(pairs: dict[str, dict], emoji: dict) -> None:
    """Give each image a short caption too, as people search, and list all short
    captions that are true of it.

    It is one tag or two, or, for some emoji with a skin tone, the name with gender and
    tone in other words.
    """
    required: dict[str, frozenset[str]] = {}
    for name, pair in pairs.items():
        rng = random.Random(f"short {name}")
        if emoji[name]["tones"] and rng.random() < 0.4:
            text = spoken_caption(emoji[name], rng)
        else:
            text, required_facts = short_caption(emoji[name], rng)
            required[text] = required_facts
        if text != pair["positive"]:
            pair["positive"] = [pair["positive"], text]
    for name, pair in pairs.items():
        own = facts(emoji[name])
        pair["attributes"] = [
            text for text, needed in required.items() if needed <= own
        ]


def leave_out_copies(domain: str, splits: dict[str, dict]) -> None:
    """Remove the pairs of train and val whose image is in a later split too."""
    with tarfile.open(HERE / domain / "gallery.tar") as tar:
        images = {
            Path(member.name).stem: tar.extractfile(member).read() for member in tar
        }
    later: set[bytes] = set()
    for split in ("test", "val", "train"):
        splits[split] = {
            name: pair
            for name, pair in splits[split].items()
            if images[name] not in later
        }
        later |= {images[name] for name in splits[split]}


def write_annotations(domain: str, names: list[str], emoji: dict) -> dict[str, int]:
    """Write metadata.jsonl and the splits' pairs; return the number of pairs of each
    split.
    """
    siblings: dict[str, list[str]] = {}
    for name in names:
        siblings.setdefault(emoji[name]["subgroup"], []).append(name)
    splits: dict[str, dict] = {"train": {}, "val": {}, "test": {}}
    lines = []
    for name in names:
        own = emoji[name]
        split = split_of(own["base"])
        category = plain_label(own["base_label"])
        swapped = negatives(name, emoji, siblings, random.Random(name))
        file = f"{name}.png"
        gender = [GENDERS[own["gender"]]] if own["gender"] in GENDERS else []
        lines.append(
            {
                "file_name": file,
                "id": name,
                "caption": domain_caption(own),
                "category": category,
                "meta_category": own["subgroup"],
                "attributes": [*tone_words(own["tones"]), *gender, *useful_tags(own)],
                "char": own["char"],
                "base": own["base"] == name,
                "split": split,
            }
        )
        splits[split][name] = {
            "file_name": file,
            "file_path": f"{domain}/{file}",
            "class_name": category,
            "positive": domain_caption(own),
            "negative": [n for n, _ in swapped],
            "negative_class": [c for _, c in swapped],
        }
    add_short_captions(splits["train"], emoji)
    leave_out_copies(domain, splits)
    folder = HERE / domain
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )
    for split, entries in splits.items():
        (folder / f"{split}.json").write_text(
            json.dumps(entries, ensure_ascii=False, separators=(",", ":")) + "\n"
        )
    return {split: len(entries) for split, entries in splits.items()}


def main() -> None:
    """Render if needed, and write both domains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--renders",
        type=Path,
        default=HERE / "build" / "renders",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--no-render",
        action="store_true",
        help="use the images that are already rendered",
    )
    args = parser.parse_args()
    if not args.no_render:
        render(args.renders)
    emoji = json.loads((args.renders / "emoji.json").read_text())
    for domain in DOMAINS:
        (HERE / domain).mkdir(exist_ok=True)
        names = sorted(
            k for k in emoji if (args.renders / domain / f"{k}.png").is_file()
        )
        write_gallery(args.renders, domain, names)
        print(domain, len(names), write_annotations(domain, names, emoji))


if __name__ == "__main__":
    main()
