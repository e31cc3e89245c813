"""The detail view, selected images and names, the keyboard and fingers, and photos of
other shapes than squares.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from index_jobs.rebuild import rebuild
from tests.support.images import draw, exif_of
from tests.support.page import COLUMNS, Page, searched, served, until
from tests.support.service import ADMIN
from tests.support.writes import WRITES

pytestmark = pytest.mark.browser

SWIPE = """
    const target = arguments[0];
    const touch = (x) => new Touch({identifier: 1, target, clientX: x, clientY: 100});
    const send = (name, options) =>
        target.dispatchEvent(new TouchEvent(name, {bubbles: true, ...options}));
    send('touchstart', {touches: [touch(300)]});
    send('touchend', {changedTouches: [touch(100)]});
"""
SIZES = {
    "landscape": (120, 80),
    "portrait": (80, 120),
    "wide": (200, 50),
    "tall": (50, 200),
    "line": (90, 1),
}
BOXES = """
    const sides = ({x, y, width, height}) => ({x, y, width, height});
    const box = (node) => sides(node.getBoundingClientRect());
    return [...document.querySelectorAll('#results .card')].map((card) => {
        const image = card.querySelector('img');
        return {title: card.querySelector('.caption').textContent,
                natural: image.naturalWidth / image.naturalHeight,
                image: box(image), map: box(card.querySelector('.map')),
                frame: box(card.querySelector('.frame'))};
    });
"""


@pytest.fixture(scope="module")
def photos(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A service of photos in two folders with the same names, one of them on its side
    in its file, and of a list.
    """
    gallery = tmp_path_factory.mktemp("photos") / "gallery"
    for folder, color, year in (("north", "red", 2023), ("south", "blue", 2024)):
        (gallery / folder).mkdir(parents=True)
        for name, size in SIZES.items():
            picture = draw(color, "cross", 200).resize(size)
            picture.save(
                gallery / folder / f"{name}.png", exif=exif_of(f"{year}:07:01 10:20:30")
            )
    upright = Image.Exif()
    upright[0x0112] = 6  # turn right to see it upright
    draw("green", "triangle", 200).resize((60, 120)).save(
        gallery / "north" / "turned_photo.jpg", exif=upright
    )
    listed = gallery.parent / "list.csv"
    listed.write_text(
        "path,price\ngallery/north/wide.png,1\ngallery/south/tall.png,2\n"
    )
    for name, source in (("index", gallery), ("listed", listed)):
        rebuild(
            source,
            tiny_checkpoint,
            gallery.parent / name,
            workers=0,
            progress=False,
        )
    with served(
        gallery.parent / "index", collections={"listed": gallery.parent / "listed"}
    ) as address:
        yield address


def test_detail_view_shows_one_image_and_everything_known_about_it(
    both: Page, site: str
) -> None:
    page = both
    page.open(f"{site}/#q=a+red+circle", 24)
    shown = page.ids()
    detail = page.detail()
    item = httpx.get(f"{site}/items/{shown[0]}").json()
    assert page.text("#detail-title") == item["caption"]
    assert item["metadata"]["color"] in page.text("#metadata")
    page.loads("#detail-image")
    image = page.one("#detail-image")
    assert f"items/{shown[0]}/image?size=1280" in image.get_attribute("src")
    download = page.one("#download")
    assert download.get_attribute("href") == f"{site}/items/{shown[0]}/image"
    assert (
        download.get_attribute("download") == Path(item["metadata"]["file_name"]).name
    )

    page.cdp(
        "Browser.grantPermissions",
        permissions=["clipboardReadWrite"],
        origin=site,
    )
    page.click("#copy")
    page.says("#detail-message", "Link copied")
    link = page.later("navigator.clipboard.readText().then(arguments[0])")
    detail.send_keys(Keys.ARROW_RIGHT)
    page.arrives(f"show={shown[1]}")
    page.click("#next")
    page.arrives(f"show={shown[2]}")
    detail.send_keys(Keys.ARROW_LEFT)
    page.arrives(f"show={shown[1]}")
    page.js(SWIPE, image)
    page.arrives(f"show={shown[2]}")
    page.close()
    until(lambda: "show=" not in page.url)
    assert page.ids() == shown
    page.open(link)
    page.says("#detail-title", item["caption"])
    page.type("#detail", Keys.ESCAPE)
    page.vanishes("#detail")
    page.settled(24)  # the gallery


def test_phone_has_room_for_images_and_the_browser_keeps_its_moves(
    phone: Page,
    site: str,
    large: str,
) -> None:
    page = phone

    def enlarge(scale: int) -> None:
        page.cdp("Emulation.setPageScaleFactor", pageScaleFactor=scale)
        until(lambda: page.js("return visualViewport.scale") == scale)

    page.open(f"{site}/#q=red", 24)
    shown = page.ids()
    page.detail()
    try:
        enlarge(2)
        page.js(SWIPE, page.one("#detail-image"))
        assert f"show={shown[0]}" in page.url
    finally:
        enlarge(1)
    page.js(SWIPE, page.one("#detail-image"))
    page.arrives(f"show={shown[1]}")

    page.open(large)
    page.counts(48)
    assert not page.has("#without")
    page.click("#more-options")
    assert page.has("#without")
    assert page.js("return document.documentElement.scrollWidth") <= 390
    assert page.detail(12).size["width"] == 390
    page.close()


def test_images_are_added_to_a_search_and_subtracted_from_it(
    page: Page, site: str
) -> None:
    page.open(f"{site}/#show={searched(site, query='red')[0]}")
    page.appears("#detail")
    assert not page.has("#less"), "there is no search to subtract it from"
    page.open(f"{site}/#q=red", 24)
    unwanted = page.ids()[0]
    page.detail()
    page.click("#less")
    page.shows(searched(site, query="red", less_like=[unwanted]))
    assert len(page.ids()) == 23
    assert f"less={unwanted}" in page.url
    assert page.text("#chips").startswith("not like")

    page.open(site, 24)
    chosen = [page.ids()[place] for place in (0, 3)]
    for place in (0, 3):
        page.click("#results .select", place)
    assert page.text("#selected-count") == "2 selected"
    assert not page.one("#selected-less").is_enabled(), "there is no search yet"
    page.click("#selected-more")
    page.shows(searched(site, more_like=chosen))
    assert page.parameter("item") == chosen
    assert "like 2 images" in page.text("#chips")
    assert not page.has("#selection")
    unwanted = page.ids()[0]
    page.click("#results .select")
    page.click("#selected-less")
    page.shows(searched(site, more_like=chosen, less_like=[unwanted]))


def test_card_is_one_tab_stop_and_keys_move_between_cards(
    page: Page, site: str
) -> None:
    def focused() -> str | None:
        return page.js(
            "return document.activeElement.closest('.card')?.dataset.id ??"
            " document.activeElement.id"
        )

    page.open(site, 24)
    shown = page.ids()
    columns = page.js(COLUMNS)
    page.js("document.querySelector('#results .open').focus()")
    for keys, place in (
        ([Keys.TAB], 1),
        ([Keys.SHIFT, Keys.TAB], 0),
        ([Keys.ARROW_RIGHT], 1),
        ([Keys.ARROW_DOWN], 1 + columns),
        ([Keys.ARROW_UP], 1),
        ([Keys.END], -1),
        ([Keys.HOME], 0),
    ):
        page.press(*keys)
        assert focused() == shown[place]
    page.press("x")
    assert page.text("#selected-count") == "1 selected"
    page.press("x")
    assert not page.has("#selection")
    page.press(Keys.ENTER)
    page.appears("#detail")
    page.type("#detail", Keys.ESCAPE)
    page.vanishes("#detail")
    until(lambda: focused() == shown[0])
    page.press("/")
    assert focused() == "query"


def test_photos_without_captions_show_their_titles_or_the_names_of_their_files(
    page: Page, photos: str
) -> None:
    page.open(photos, 11)
    titles = page.texts("#results .caption")
    assert sorted(titles) == sorted([*SIZES, *SIZES, "turned photo"])
    assert page.texts("#facets h3") == ["Category", "Taken"], "titles are no filter"
    assert page.texts("#sort option")[-4:-2] == [
        "Taken, oldest first",
        "Taken, newest first",
    ]
    next(
        button for button in page.all("#facets button span") if button.text == "2024"
    ).click()
    page.settled(5)
    page.detail()
    assert "2024-07-01 10:20:30" in page.text("#metadata")
    page.open(f"{photos}/#in=listed", 2)
    assert sorted(page.texts("#results .caption")) == ["tall.png", "wide.png"]


def test_explained_photos_keep_their_shape_under_a_map_of_what_the_model_sees(
    both: Page, photos: str
) -> None:
    page = both
    page.open(f"{photos}/#q=cross", 11)
    plain = page.js(BOXES)
    page.open(f"{photos}/#q=cross&explain=1", 11)
    page.counts(8, ".explained")
    explained = [each for each in page.js(BOXES) if each["map"]["width"]]
    assert len(explained) == 8
    for each in explained:
        image = each["image"]
        frame = each["frame"]
        assert frame["height"] == pytest.approx(plain[0]["frame"]["height"], abs=0.5), (
            "explaining moves no image"
        )
        if each["title"] != "line":
            assert image["width"] / image["height"] == pytest.approx(
                each["natural"], rel=0.05
            )
        assert image["width"] <= frame["width"] + 0.5
        assert each["map"] == pytest.approx(image, abs=0.5)
    turned = next(each["image"] for each in plain if each["title"] == "turned photo")
    assert turned["width"] == pytest.approx(2 * turned["height"], rel=0.05)


def test_images_teach_a_name_that_answers_sharpen(
    both: Page,
    indexes: dict[str, Path],
    tmp_path: Path,
) -> None:
    page = both
    index = Path(shutil.copytree(indexes["shapes"], tmp_path / "index"))
    with (
        served(index, page_hybrid=False, **WRITES) as site,
        served(index, page_hybrid=False) as reading,
    ):

        def concept() -> Any:
            return httpx.get(f"{site}/concepts/our-red").json()

        page.open(f"{site}/#q=red", 24)
        chosen = page.ids()[0]
        page.click("#results .select")
        page.click("#selected-teach")
        page.type("#name", " our red", Keys.TAB, "shape", Keys.ENTER)
        page.appears("#key").send_keys(ADMIN, Keys.ENTER)
        assert ["401" in message for message in page.errors()] == [True], (
            "Chromium logs every 4xx itself"
        )
        page.click("#selected-teach")
        assert page.barriers() == []
        page.click("#teach button")
        page.arrives("#name=our-red")
        page.shows(searched(site, query="@our-red"))
        assert concept()["ids"] == [chosen]
        assert concept()["not_ids"] == []
        assert concept()["kind"] == "shape"
        page.says("#concept-facts", f"{concept()['members']} image", "from 1 example")
        results = httpx.post(
            f"{site}/search/text", json={"query": "@our-red", "k": 24}
        ).json()["results"]
        results.sort(key=lambda result: abs(result["score"] - concept()["cutoff"]))
        doubtful = next(result["id"] for result in results if result["id"] != chosen)
        page.counts(6, "#doubts li")
        assert page.barriers() == []
        page.click("#doubts li button:nth-child(2)")
        page.says("#concept-facts", "from 2 examples")
        assert concept()["ids"] == [chosen, doubtful]
        page.click("#doubts li button:nth-child(3)")
        until(lambda: len(concept()["not_ids"]) == 1)
        for address in (site, reading):
            page.open(address, 24)
            page.type("#query", "a @o")
            page.appears("#names button").click()
            page.type("#query", "circle")
            page.arrives("#q=a+circle&name=our-red")
            page.shows(searched(site, query="@our-red a circle"))
            page.click("#results .select")
            page.click(".chip .link")
            page.appears("#concept")
            assert [page.has(part) for part in ("#selected-teach", "#forget")] == [
                address == site
            ] * 2
        page.open(f"{site}/#name=our-red", 24)
        page.appears("#forget").click()
        page.driver.switch_to.alert.accept()
        until(lambda: httpx.get(f"{site}/concepts").json() == {"concepts": []})
