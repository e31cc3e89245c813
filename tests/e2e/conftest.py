"""A browser, and services with one or several collections."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from index_jobs.rebuild import rebuild
from tests.support.files import write_jsonl
from tests.support.images import draw
from tests.support.page import COUNT, Page, served
from tests.support.parts import BROWSER, DRIVER
from tests.support.service import KEYS

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1100,900",
)
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests of this folder out of the quick round: each starts a browser, a
    server or commands.
    """
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def indexes(
    tiny_data: Path,
    tiny_checkpoint: Path,
    other_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Indexes by name: one with a cut-off, other galleries and models, and one with a
    group field.
    """
    path = tmp_path_factory.mktemp("page")

    def build(name: str, gallery: Path, checkpoint: Path, **options: Any) -> Path:
        rebuild(
            gallery,
            checkpoint,
            path / name,
            workers=0,
            progress=False,
            **options,
        )
        return path / name

    return {
        "shapes": build("shapes", tiny_data, tiny_checkpoint, validation=tiny_data),
        "circles": build("circles", tiny_data / "circle", other_checkpoint),
        "another": build("another", tiny_data, other_checkpoint),
        "products": build("products", tiny_data, tiny_checkpoint, group_field="color"),
    }


@pytest.fixture(scope="session")
def site(indexes: dict[str, Path]) -> Iterator[str]:
    """A service with one collection, whose page looks no words up."""
    with served(indexes["shapes"], page_hybrid=False) as address:
        yield address


@pytest.fixture(scope="session")
def many(indexes: dict[str, Path]) -> Iterator[str]:
    """A service with every collection, whose page looks no words up; shapes is the
    default one.
    """
    others = {name: index for name, index in indexes.items() if name != "shapes"}
    with served(indexes["shapes"], collections=others, page_hybrid=False) as address:
        yield address


@pytest.fixture(scope="session")
def large_index(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An index of more images than one page of the gallery shows, each with a price."""
    gallery = tmp_path_factory.mktemp("large") / "gallery"
    gallery.mkdir()
    rows = []
    for number in range(COUNT):
        name = f"{number:03}.png"
        shape = ("square", "circle", "triangle", "cross")[number % 4]
        draw(("red", "green", "blue", "orange", "purple")[number % 5], shape).save(
            gallery / name
        )
        price = (number * 37) % COUNT
        rows.append(
            {
                "file_name": name,
                "caption": f"image {number}",
                "category": shape,
                "price": price,
            }
        )
    write_jsonl(gallery / "metadata.jsonl", *rows)
    rebuild(
        gallery,
        tiny_checkpoint,
        gallery.parent / "index",
        workers=0,
        progress=False,
    )
    return gallery.parent / "index"


@pytest.fixture(scope="session")
def large(large_index: Path) -> Iterator[str]:
    """A service of many images, whose page looks words up."""
    with served(large_index) as address:
        yield address


@pytest.fixture(scope="session")
def locked(indexes: dict[str, Path]) -> Iterator[str]:
    """A service that asks for a key, and whose page looks words up."""
    with served(indexes["shapes"], **KEYS) as address:
        yield address


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(0)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """The page, which logs no error that the test has not read."""
    page = Page(browser)
    yield page
    assert page.errors() == []


@pytest.fixture
def phone(page: Page) -> Iterator[Page]:
    """The page on the screen of a phone."""
    page.cdp("Emulation.setDeviceMetricsOverride", **PHONE)
    page.cdp("Emulation.setTouchEmulationEnabled", enabled=True)
    yield page
    page.cdp("Emulation.setTouchEmulationEnabled", enabled=False)
    page.cdp("Emulation.clearDeviceMetricsOverride")


@pytest.fixture(params=["desktop", "phone"])
def both(request: pytest.FixtureRequest, page: Page) -> Page:
    """The page in the window of the browser, and on a phone."""
    return request.getfixturevalue("phone") if request.param == "phone" else page
