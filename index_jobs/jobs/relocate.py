"""Relocation of a published index whose gallery or model was moved: a new version with other locations.

Nothing is encoded, and all files are shared with the previous version, except items with absolute locations below the
former folder, and the configuration of a checkpoint whose model was moved.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dcar_core import Encoder
from dcar_core.util.errors import DataError
from dcar_core.util.files import write_json
from index_jobs.gallery.storage import is_url, parent_folder
from index_jobs.spec import BuildOptions
from index_jobs.store import publish
from index_jobs.store.artifact import Artifact
from index_jobs.store.items import write_items
from index_jobs.store.manifest import CHECKPOINT, ITEMS, Manifest, utc_now
from index_jobs.store.versions import open_current

logger = logging.getLogger(__name__)

_CONFIG = f"{CHECKPOINT}/config.json"


def relocate(
    index: Path,
    *,
    gallery: str | None = None,
    former: str | None = None,
    model: Path | None = None,
    keep: int = BuildOptions.keep,
) -> Manifest:
    """Publish a version with another location of its images, its model, or both.

    Args:
        gallery: the new folder of the images, or the new location of the tar or list.
        former: the folder that was moved there; None for the root of the gallery.
        model: the new directory or file of the backbone.

    Raises:
        DataError: most sampled images are missing at the new location, or the model comes from a hub.
        CheckpointError, ModelError: the model at the new location is another one, or cannot be loaded.
    """
    with publish.report_os_errors(index), publish.open_staging(index) as staging:
        current = open_current(index)
        manifest, written = current.manifest, set[str]()
        if gallery is not None:
            old, new = _absolute(former or manifest.root), _absolute(gallery)
            if not old:
                raise DataError(f"name the folder that was moved with --from: {', '.join(manifest.folders)}")
            new = parent_folder(new).rstrip("/") if not is_url(new) and Path(new).is_file() else new
            manifest = _move_locations(manifest, old, new)
            written |= _write_moved_items(current, staging, old, new)
            if manifest.folders == current.manifest.folders and not written:
                raise DataError(f"no image of {index} is below {old}; they are in {', '.join(manifest.folders)}")
        if model is not None:
            _write_config(current, staging, model.absolute())
            written.add(_CONFIG)
        kept = {name: info for name, info in current.manifest.files.items() if name not in written}
        shared = publish.share_files(current.path, staging, kept)
        if model is not None:
            current.require(Encoder.load(staging / CHECKPOINT, device="cpu").fingerprint)  # it may be another model
        staged = publish.prepare_version(index, staging, manifest, shared=shared)
        if gallery is not None and (fault := staged.find_gallery_fault(new)):
            raise DataError(f"nothing is published: {fault}; give the new location of {old}")
        for folder in (each for each in manifest.folders if not is_url(each) and not Path(each).exists()):
            logger.warning("%s is missing as well; relocate it with --from %s", folder, folder)
        return publish.commit_version(index, staged, keep=keep)


def _absolute(location: str) -> str:
    return (location if is_url(location) or not location else str(Path(location).absolute())).rstrip("/")


def _moved(location: str, old: str, new: str) -> str:
    return new + location[len(old) :] if location == old or location.startswith(old + "/") else location


def _move_locations(manifest: Manifest, old: str, new: str) -> Manifest:
    def moved_source(source: str) -> str:
        name, equals, location = source.partition("=")
        return _moved(source, old, new) if "/" in name else f"{name}{equals}{_moved(location, old, new)}"

    def moved_sources(sources: str) -> str:
        return ", ".join(map(moved_source, sources.split(", ")))

    def moved_all(roots: list[str]) -> list[str]:
        return [_moved(root, old, new) for root in roots]

    additions = [
        replace(
            addition, sources=[moved_sources(source) for source in addition.sources], roots=moved_all(addition.roots)
        )
        for addition in manifest.additions
    ]
    return replace(
        manifest,
        spec=replace(manifest.spec, gallery=moved_sources(manifest.spec.gallery)),
        root=_moved(manifest.root, old, new),
        roots=moved_all(manifest.roots),
        additions=additions,
        created=utc_now(),
    )


def _write_moved_items(current: Artifact, staging: Path, old: str, new: str) -> set[str]:
    """Write the items that have absolute locations below the former folder, and return the names of their files."""
    names = [ITEMS, *(f"{addition.folder}/{ITEMS}" for addition in current.manifest.additions)]
    written = set[str]()
    for name, segment in zip(names, current.segments, strict=True):
        table = segment.items.table()
        locations = table["location"].to_pylist()
        moved = [_moved(location, old, new) for location in locations]
        if moved != locations:
            (staging / name).parent.mkdir(exist_ok=True)
            column = table.schema.get_field_index("location")
            table = table.set_column(column, "location", pa.chunked_array([moved], pa.string()))
            write_items(staging / name, table, np.arange(len(moved)))
            written.add(name)
    return written


def _write_config(current: Artifact, staging: Path, model: Path) -> None:
    config: dict[str, Any] = json.loads((current.path / _CONFIG).read_text(encoding="utf-8"))
    backbone = config["backbone"]
    local = [key for key in ("model", "pretrained") if backbone[key] and Path(backbone[key]).is_absolute()]
    if not local:
        raise DataError(f"the model {backbone['model']} comes from a hub, so it has no location to change")
    backbone[local[0] if model.is_dir() else local[-1]] = str(model)
    (staging / CHECKPOINT).mkdir(exist_ok=True)
    write_json(staging / _CONFIG, config)
