"""A browser, and services with one or two collections."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.settings import Settings
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_zero_shot
from index_jobs.rebuild import rebuild
from tests.support.page import Page, ready, served

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--window-size=1100,900",
)  # fmt: skip
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


@pytest.fixture(scope="session")
def site(tiny_gallery: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    index = tmp_path_factory.mktemp("page") / "index"
    rebuild(tiny_gallery, tiny_checkpoint, index, workers=0, progress=False)
    with served(Settings(index=index, device="cpu")) as address:
        yield ready(address)


@pytest.fixture(scope="session")
def two(
    tiny_data: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Two collections; in the default one a cut-off is calibrated."""
    path = tmp_path_factory.mktemp("two")
    rebuild(tiny_data, tiny_checkpoint, path / "shapes", workers=0, progress=False, validation=tiny_data)
    rebuild(tiny_data / "circle", other_checkpoint, path / "circles", workers=0, progress=False)
    settings = Settings(index=path / "shapes", collections={"circles": path / "circles"}, device="cpu")
    with served(settings) as address:
        yield ready(address)


@pytest.fixture(scope="session")
def rivals(
    tiny_gallery: Path, tiny_checkpoint: Path, other_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """One gallery by two models."""
    path = tmp_path_factory.mktemp("rivals")
    for name, checkpoint in (("one", tiny_checkpoint), ("another", other_checkpoint)):
        rebuild(tiny_gallery, checkpoint, path / name, workers=0, progress=False)
    settings = Settings(index=path / "one", collections={"another": path / "another"}, device="cpu")
    with served(settings) as address:
        yield ready(address)


@pytest.fixture(scope="session")
def untouched(tiny_gallery: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The gallery by the model without adaptation."""
    path = tmp_path_factory.mktemp("untouched")
    save_zero_shot(load_backbone(BackboneSource(str(tiny_model))), path / "checkpoint")
    rebuild(tiny_gallery, path / "checkpoint", path / "index", workers=0, progress=False)
    with served(Settings(index=path / "index", device="cpu")) as address:
        yield ready(address)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("no browser to drive: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install 'dcar[dev]'")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(0)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any) -> Page:
    return Page(browser)


@pytest.fixture
def phone(page: Page) -> Iterator[Page]:
    """The page on the screen of a phone."""
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    yield page
    page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture(params=["desktop", "phone"])
def both(request: pytest.FixtureRequest, page: Page) -> Page:
    """The page in the window of the browser, and on a phone."""
    return request.getfixturevalue("phone") if request.param == "phone" else page
