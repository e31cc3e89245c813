"""Versions that older code wrote: they open, are searched, updated and rebuilt.

Each archive in `formats` is an index of three squares, red, green and blue, in 8 dimensions.
"""

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dcar_core.model.checkpoint import read_config
from dcar_core.util.files import canonical_json
from index_jobs.jobs.update import remove
from index_jobs.spec import IndexSpec
from index_jobs.store.filters import match_rows
from index_jobs.store.manifest import FORMAT, OVER_HTTP, Manifest
from index_jobs.store.versions import current_version, open_current, open_version, verify_index

ARCHIVES = sorted((Path(__file__).parent / "formats").glob("*.zip"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.stem)
def archive(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def older(archive: Path, tmp_path: Path) -> Path:
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "index")
    return tmp_path / "index"


def test_older_versions_are_searched(older: Path, archive: Path) -> None:
    assert len(verify_index(older)) == 1
    artifact = open_current(older)
    rows = np.arange(3)
    assert artifact.search(artifact.vectors(rows), 1)[1][:, 0].tolist() == [0, 1, 2]
    assert [artifact.item(row).id for row in range(3)] == ["blue", "green", "red"]
    assert artifact.item(1).width == (20 if archive.stem == "without-spec" else None)
    assert artifact.row_of("green") == 1
    assert match_rows(artifact, {"price": {"gt": 3}}).tolist() == [True, True, False]
    has_lexical = archive.stem != "without-lexical"
    assert (artifact.lexical is not None) == artifact.manifest.has_lexical == has_lexical
    if artifact.lexical is not None:
        assert artifact.lexical.search("green", 3)[1].tolist() == [1]


def test_an_older_manifest_says_what_was_asked_for(older: Path, archive: Path) -> None:
    spec, has_fields = open_current(older).manifest.spec, archive.stem != "without-lexical"
    assert spec == IndexSpec(
        gallery="/tmp/dcar/photos",
        gallery_signature=spec.gallery_signature,
        fingerprint=read_config(open_current(older).checkpoint)["fingerprint"],
        memory=2**30,
        runtime="auto",
        text_fields=("price",) if has_fields else None,
        group_field="price" if has_fields else "",
    )


def test_an_older_version_is_updated_in_the_present_format(older: Path) -> None:
    remove(older, ["red"])
    assert current_version(older) == 2
    updated = open_current(older)
    assert (updated.manifest.format, updated.manifest.count, updated.row_of("red")) == (FORMAT, 2, None)
    assert updated.manifest.spec == open_version(older, 1).manifest.spec
    assert len(verify_index(older)) == 2


@pytest.mark.parametrize("over_http", [True, False])
def test_a_manifest_with_over_http_in_place_of_an_origin_is_read(
    over_http: bool, published: Path, tmp_path: Path
) -> None:
    manifest = open_current(published).manifest
    values = manifest.to_dict()
    del values["checksum"], values["origin"]
    values["over_http"] = over_http
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(values | {"checksum": hashlib.sha256(canonical_json(values)).hexdigest()}))
    assert Manifest.read(file) == replace(manifest, origin=OVER_HTTP if over_http else "")
