"""Small distinct pictures for galleries."""

from PIL import Image, ImageDraw


def draw(color: str, shape: str, side: int = 48) -> Image.Image:
    image = Image.new("RGB", (side, side), "white")
    pen, box = ImageDraw.Draw(image), (8, 8, side - 8, side - 8)
    if shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "triangle":
        pen.polygon([(side // 2, 8), (8, side - 8), (side - 8, side - 8)], fill=color)
    else:
        pen.line((8, 8, side - 8, side - 8), fill=color, width=8)
        pen.line((8, side - 8, side - 8, 8), fill=color, width=8)
    return image
