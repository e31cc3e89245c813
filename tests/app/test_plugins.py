"""A plug-in with a route and a setting: that of the how-to page."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.plugins import find_plugins
from app.core.settings import load_settings
from dcar_core.util.errors import DcarError
from tests.support.paths import ROOT
from tests.support.service import ALICE, KEYS, WORDS, bearer, opened


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the plug-in, which is on the path."""
    page = (ROOT / "docs/how-to/add-a-route.md").read_text()
    code = page.partition("```python\n# tally.py\n")[2].partition("```")[0]
    (tmp_path / "tally.py").write_text(code)
    metadata = tmp_path / "dcar_tally-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: dcar-tally\nVersion: 0.1.0\n"
    )
    (metadata / "entry_points.txt").write_text("[dcar.routes]\ntally = tally:Tally\n")
    monkeypatch.syspath_prepend(tmp_path)
    find_plugins.cache_clear()
    yield tmp_path
    find_plugins.cache_clear()
    sys.modules.pop("tally", None)


@pytest.mark.usefixtures("installed")
async def test_a_plugin_adds_a_route_and_sees_searches(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCAR_TALLY_START", "10")
    load_settings(index=built_index)  # knows the variable
    async with opened(built_index, **KEYS) as client:
        assert (await client.get("/tally")).status_code == 401
        client.headers.update(bearer(ALICE))
        await client.post("/search/text", json=WORDS)
        await client.post("/search/batch", json={"queries": [WORDS, WORDS]})
        await client.post("/search/text", json={"query": 3})
        assert (await client.get("/tally")).json() == {"searches": 13}
        assert "/tally" in client.app.openapi()["paths"]


@pytest.mark.usefixtures("installed")
def test_a_wrong_setting_of_a_plugin_is_named(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCAR_TALLY_START", "-1")
    with pytest.raises(DcarError, match="DCAR_TALLY_START: Input should be greater"):
        load_settings(index=built_index)
    monkeypatch.setenv("DCAR_TALLY_STAR", "1")
    with pytest.raises(DcarError, match="did you mean DCAR_TALLY_START"):
        load_settings(index=built_index)


def test_a_broken_plugin_ends_the_start(installed: Path) -> None:
    (installed / "tally.py").write_text("import nothing_of_this_name")
    with pytest.raises(DcarError, match="plug-in tally:Tally cannot be loaded"):
        load_settings(index=installed)
