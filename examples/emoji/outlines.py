"""Draw the styles that come from fonts, and colour outlined styles: both teach the base
model about outlined emoji.

    python examples/emoji/outlines.py --renders examples/emoji/build/renders --symbola
    Symbola_hint.ttf

- noto-mono-400, noto-mono-700 (Noto Emoji, from npm) and symbola (from Debian's package
  fonts-symbola) are glyphs.
- noto-filled, fluent-filled and symbola-filled are outlines whose enclosed areas have
  the colours of the same emoji in a coloured style.

Run it after render.mjs, which writes the coloured styles. It needs fonttools, brotli
and scipy, and takes a minute.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

HERE = Path(__file__).parent
NOTO = HERE / "node_modules" / "@fontsource" / "noto-emoji" / "files"
RENDERED = 64  # pixels
FONT_SIZE = 200
MARGIN = 20
FIRST = 0x203C  # The code points before it are digits and letters.
FILLED = {
    "noto-filled": ("noto-mono-400", ("noto", "fluent-emoji-flat")),
    "fluent-filled": ("fluent-emoji-high-contrast", ("fluent-emoji-flat", "noto")),
    "symbola-filled": ("symbola", ("noto", "fluent-emoji-flat")),
}


def draw_glyphs(files: list[Path], folder: Path, emoji: list[str]) -> int:
    """Draw the emoji of one code point that the font files have; return their
    number.
    """
    folder.mkdir(exist_ok=True)
    drawn = 0
    for file in files:
        known = TTFont(file).getBestCmap()
        font = ImageFont.truetype(str(file), FONT_SIZE)
        for name in emoji:
            target = folder / f"{name}.png"
            if (
                "-" in name
                or int(name, 16) < FIRST
                or int(name, 16) not in known
                or target.exists()
            ):
                continue
            image = draw_glyph(chr(int(name, 16)), font)
            if image is not None:
                save(image, target)
                drawn += 1
    return drawn


def save(image: Image.Image, target: Path) -> None:
    """Write a whole PNG or none: a later run keeps the files that it finds."""
    part = target.with_suffix(".part")
    image.save(part, "PNG")
    part.replace(target)


def draw_glyph(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Return a glyph in dark ink on a transparent square, None for an empty one."""
    left, top, right, bottom = font.getbbox(character)
    side = int(max(right - left, bottom - top)) + MARGIN
    if min(right - left, bottom - top) < MARGIN / 2:
        return None
    corner = ((side - right + left) / 2 - left, (side - bottom + top) / 2 - top)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).text(corner, character, font=font, fill=255)
    image = Image.new("RGBA", (RENDERED, RENDERED), (30, 30, 30, 0))
    image.putalpha(mask.resize((RENDERED, RENDERED), Image.Resampling.LANCZOS))
    return image


def colour(outline: np.ndarray, coloured: np.ndarray) -> np.ndarray | None:
    """Fill each enclosed area of an outline with the median colour below it; None where
    little is enclosed.

    Both are RGBA, (64, 64, 4).
    """
    ink = outline[..., 3:] / 255
    areas, count = ndimage.label(np.pad(ink[..., 0] <= 0.35, 1, constant_values=True))
    outside = areas[0, 0]
    areas = areas[1:-1, 1:-1]
    opaque = coloured[..., 3] > 128
    if not opaque.any():
        return None
    fill = np.zeros((*areas.shape, 3))
    alpha = np.zeros((*areas.shape, 1))
    filled = 0
    for number in range(1, count + 1):
        area = areas == number
        if number == outside or area.sum() < 6:
            continue
        below = coloured[area & opaque]
        # below the outline's soft edge
        grown = ndimage.binary_dilation(area, iterations=2)
        fill[grown] = np.median(
            (below if len(below) >= 4 else coloured[opaque])[:, :3], axis=0
        )
        alpha[grown] = 1
        filled += area.sum()
    if filled < 40:
        return None
    rgb = fill * (1 - ink) + 20 * ink
    alpha = np.maximum(alpha, ink)
    return np.concatenate([rgb, 255 * alpha], axis=2).round().astype(np.uint8)


def colour_style(
    renders: Path,
    outlined: str,
    coloured: tuple[str, ...],
    out: str,
) -> int:
    """Colour a style's images with those of the first coloured style that has the
    emoji; return their number.
    """
    (renders / out).mkdir(exist_ok=True)
    written = 0
    for file in sorted((renders / outlined).glob("*.png")):
        source = next(
            (
                renders / style / file.name
                for style in coloured
                if (renders / style / file.name).exists()
            ),
            None,
        )
        if source is None:
            continue
        pixels = [
            np.asarray(Image.open(f).convert("RGBA"), float) for f in (file, source)
        ]
        result = colour(*pixels)
        if result is not None:
            save(Image.fromarray(result, "RGBA"), renders / out / file.name)
            written += 1
    return written


def main() -> None:
    """Draw the fonts' glyphs, then colour outlines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--renders",
        type=Path,
        required=True,
        help="output of render.mjs",
    )
    parser.add_argument("--symbola", type=Path, required=True, help="the font's file")
    args = parser.parse_args()
    emoji = list(json.loads((args.renders / "emoji.json").read_text()))
    for weight in (400, 700):
        files = sorted(NOTO.glob(f"noto-emoji-*-{weight}-normal.woff2"))
        print(
            f"noto-mono-{weight}",
            draw_glyphs(files, args.renders / f"noto-mono-{weight}", emoji),
        )
    print("symbola", draw_glyphs([args.symbola], args.renders / "symbola", emoji))
    for out, (outlined, coloured) in FILLED.items():
        print(out, colour_style(args.renders, outlined, coloured, out))


if __name__ == "__main__":
    main()
