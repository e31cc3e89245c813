"""A folder of photos of other shapes than squares, without captions."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from index_jobs.rebuild import rebuild
from tests.support.images import draw
from tests.support.page import Page, served, until

pytestmark = pytest.mark.browser

ROTATED = 6  # EXIF's value of "turn right to see it upright"
SIZES = {"landscape": (120, 80), "portrait": (80, 120), "wide": (200, 50), "tall": (50, 200), "line": (90, 1)}
BOXES = """
    const box = (node) => (({x, y, width, height}) => ({x, y, width, height}))(node.getBoundingClientRect());
    return [...document.querySelectorAll('#results .card')].map((card) => {
        const image = card.querySelector('img');
        return {title: card.querySelector('.caption').textContent, natural: image.naturalWidth / image.naturalHeight,
                image: box(image), map: box(card.querySelector('.map')), frame: box(card.querySelector('.frame'))};
    });
"""


@pytest.fixture(scope="module")
def photos(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service of photos in two folders with the same names, one of them on its side in its file, and of a list."""
    gallery = tmp_path_factory.mktemp("photos") / "gallery"
    for folder, color in (("north", "red"), ("south", "blue")):
        (gallery / folder).mkdir(parents=True)
        for name, size in SIZES.items():
            draw(color, "cross", 200).resize(size).save(gallery / folder / f"{name}.png")
    upright = Image.Exif()
    upright[0x0112] = ROTATED
    draw("green", "triangle", 200).resize((60, 120)).save(gallery / "north" / "turned_photo.jpg", exif=upright)
    Image.new("RGB", (180, 120), "teal").save(gallery / "north" / "full.png")
    listed = gallery.parent / "list.csv"
    listed.write_text("path,price\ngallery/north/wide.png,1\ngallery/south/tall.png,2\n")
    for name, source in (("index", gallery), ("listed", listed)):
        rebuild(source, tiny_checkpoint, gallery.parent / name, workers=0, progress=False)
    with served(gallery.parent / "index", collections={"listed": gallery.parent / "listed"}) as address:
        yield address


def test_photos_without_captions_show_their_titles_and_have_no_filter_by_title(page: Page, photos: str) -> None:
    page.open(photos)
    page.settled(12)
    titles = [card.text.split("\n")[0] for card in page.all("#results .card")]
    assert sorted(titles) == sorted([*SIZES, *SIZES, "full", "turned photo"])
    assert [each.text for each in page.all("#facets h3")] == ["Category"]
    until(lambda: page.all("#sort option[value=title]"))
    fields = [each.get_attribute("value") for each in page.all("#sort option")]
    assert fields == ["", *(sign + name for name in ("category", "file_name", "title") for sign in ("", "-"))]
    page.one("#results .open").click()
    until(lambda: page.one("#detail").is_displayed())
    assert page.one("#detail-title").text == titles[0]
    page.one("#similar").click()
    until(lambda: page.one("#chips").text.startswith(f"like {titles[0]}"))


def test_photos_without_captions_and_titles_show_the_names_of_their_files(page: Page, photos: str) -> None:
    page.open(f"{photos}/#in=listed")
    page.settled(2)
    assert sorted(card.text.split("\n")[0] for card in page.all("#results .card")) == ["tall.png", "wide.png"]


def test_explained_photos_keep_their_shape_under_an_aligned_map(both: Page, photos: str) -> None:
    page = both
    page.open(f"{photos}/#q=cross")
    page.settled(12)
    plain = page.driver.execute_script(BOXES)
    page.open(f"{photos}/#q=cross&explain=1")
    page.settled(12)
    until(lambda: len(page.all(".explained")) == 8)
    explained = [each for each in page.driver.execute_script(BOXES) if each["map"]["width"]]
    assert len(explained) == 8
    for each in explained:
        image, frame = each["image"], each["frame"]
        assert frame["height"] == pytest.approx(plain[0]["frame"]["height"], abs=0.5), "explaining moves no image"
        if each["title"] != "line":
            assert image["width"] / image["height"] == pytest.approx(each["natural"], rel=0.05)
        assert image["x"] >= frame["x"] - 0.5
        assert image["y"] >= frame["y"] - 0.5
        assert image["height"] >= 1
        assert image["width"] <= frame["width"] + 0.5
        assert each["map"] == pytest.approx(image, abs=0.5)
    turned = next(each for each in plain if each["title"] == "turned photo")
    assert turned["image"]["width"] == pytest.approx(2 * turned["image"]["height"], rel=0.05)


def test_photos_fill_their_cards_and_pictures_on_white_are_whole(page: Page, photos: str) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    try:
        page.open(f"{photos}/#q=cross")
        page.settled(12)
        boxes = {each["title"]: each for each in page.driver.execute_script(BOXES)}
        assert boxes["full"]["image"] == boxes["full"]["frame"]
        assert boxes["portrait"]["image"]["height"] < boxes["portrait"]["frame"]["height"]
        white = page.one(".card.pale")
        assert white.find_element("css selector", "img").value_of_css_property("mix-blend-mode") == "multiply"
        for part in (".frame", ".picture"):
            ground = white.find_element("css selector", part).value_of_css_property("background-color")
            assert ground not in {"rgba(0, 0, 0, 0)", "rgba(255, 255, 255, 1)"}, "no white square on the dark page"
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize(("fit", "side"), [("cover", min), ("contain", max)])
def test_map_lies_on_the_square_that_the_model_sees(
    page: Page, photos: str, fit: str, side: Callable[[float, float], float]
) -> None:
    page.open(f"{photos}/#q=cross&explain=1")
    page.settled(12)
    until(lambda: len(page.all(".explained")) == 8)
    page.driver.execute_script(
        "document.querySelectorAll('.map').forEach((map) => (map.dataset.fit = arguments[0]))", fit
    )
    for each in page.driver.execute_script(BOXES):
        image, cover = each["image"], each["map"]
        if cover["width"]:
            assert cover["width"] == cover["height"] == pytest.approx(side(image["width"], image["height"]), abs=0.5)
            assert cover["x"] + cover["width"] / 2 == pytest.approx(image["x"] + image["width"] / 2, abs=0.5)
            assert cover["y"] + cover["height"] / 2 == pytest.approx(image["y"] + image["height"] / 2, abs=0.5)
