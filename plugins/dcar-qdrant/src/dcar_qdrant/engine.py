"""The engine `qdrant=LOCATION`: a collection for each built version and each addition.

- A collection is named after the index, the version and a random number; `qdrant.json`
  in the version names it. It belongs to a version once that is published with all of
  its points, so what a killed job has uploaded is never served.
- CURRENT decides which version is served. The alias `<name>_current` follows it, also
  in a rollback, for other readers.
- Collections of removed versions and of killed jobs are dropped after a publication,
  except those of higher numbers: another machine may have published them since.
- The key is read from QDRANT_API_KEY and never written.
"""

import hashlib
import logging
import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pyarrow as pa
from qdrant_client import models

from dcar_core.util.arrays import Floats
from dcar_core.util.errors import DataError, StoreUnavailableError
from dcar_core.util.files import write_json
from dcar_qdrant.conditions import payload_keys
from dcar_qdrant.connection import API_KEY, call, connect
from dcar_qdrant.index import BATCH, LOCATION, QdrantIndex, QdrantLocation
from index_jobs.engines.measure import Benchmark, tune
from index_jobs.engines.protocol import (
    EXACT_UP_TO,
    CreatedIndex,
    Engine,
    Files,
    NewIndex,
)
from index_jobs.row_filter import EMPTY_IS_MISSING
from index_jobs.spec import IndexSpec

logger = logging.getLogger(__name__)

_KINDS = ("auto", "flat", "hnsw")
_DEGREE = 24
_CONSTRUCTION_WIDTH = 200
_SETTINGS = frozenset({"shard_number", "replication_factor", "hnsw_ef"})
_QUANTIZATIONS = {
    "int8": {"scalar": {"type": "int8", "always_ram": True}},
    "binary": {"binary": {"always_ram": True}},
}
_UNINDEXED = "caption"  # a long text, and seldom in a filter
# of payload fields by type; others are keywords
_INDEXES = {"bool": "bool", "int64": "integer", "double": "float"}
POLL_SECONDS = 1  # between looks whether a server has built its graphs
_INDEXING_SECONDS = 6 * 3600  # that it may take


class QdrantEngine(Engine):
    """Collections of one Qdrant; see `index_jobs.engines.protocol.Engine`."""

    def __init__(self, uri: str) -> None:
        """uri:
        LOCATION?shard_number=2&replication_factor=2&quantization=int8&hnsw_ef=128, with
        any of the settings.
        """
        location, _, query = uri.partition("?")
        if "://" in location:
            location = location.rstrip("/")
        elif location not in ("", ":memory:"):
            location = str(Path(location).absolute())  # services start elsewhere
        self._location = location
        settings = dict(parse_qsl(query, keep_blank_values=True))
        self._quantization = settings.pop("quantization", "")
        is_known = settings.keys() <= _SETTINGS and all(
            text.isdecimal() and int(text) for text in settings.values()
        )
        if (
            not self._location
            or self._quantization not in ("", *_QUANTIZATIONS)
            or not is_known
        ):
            raise DataError(
                "the engine qdrant takes the URL of a server, or a folder to try it,"
                f" and after ? settings: {', '.join(sorted(_SETTINGS))} (above 0),"
                f" quantization ({' or '.join(_QUANTIZATIONS)}); not {uri!r}"
            )
        self._settings = {name: int(text) for name, text in settings.items()}

    def plan(self, spec: IndexSpec, count: int, dim: int) -> int:
        """Check that Qdrant has the kind and responds."""
        if spec.kind not in _KINDS:
            raise DataError(
                f"vectors in Qdrant can be of kind {', '.join(_KINDS)}, not"
                f" {spec.kind!r}"
            )
        is_url = "://" in self._location
        name = Path(self._location).name
        if (
            not is_url
            and re.fullmatch(r"[\w.-]+:\d+", name)
            and not Path(self._location).exists()
        ):
            raise DataError(
                f"{name} would be a folder; give the URL of the server, http://{name}"
            )
        # the client does not send it, but it would be published
        if is_url and "@" in self._location:
            raise DataError(
                f"the URL of a Qdrant has no user or password; set {API_KEY}"
            )
        call(connect(self._location).get_collections, attempts=1)
        return 0

    def create(self, spec: IndexSpec, new: NewIndex) -> CreatedIndex:
        """Create, fill and tune a collection, and write `qdrant.json`."""
        is_flat = spec.kind == "flat" or (
            spec.kind == "auto" and new.count <= EXACT_UP_TO
        )
        keys = payload_keys(new.fields.column_names)
        fields = {
            name: [keys[name], str(new.fields.schema.field(name).type)] for name in keys
        }
        location = QdrantLocation(
            location=self._location,
            count=new.count,
            dim=new.dim,
            fields=fields,
            collection=(
                f"{collection_prefix(new.name)}_v{new.version}_{secrets.token_hex(4)}"
            ),
            is_quantized=bool(self._quantization) and not is_flat,
            hnsw_ef=(
                None
                if is_flat
                else self._settings.get("hnsw_ef", QdrantIndex.min_width)
            ),
        )
        start = time.perf_counter()
        self._fill(location, new)
        seconds = time.perf_counter() - start
        index = QdrantIndex(location)
        benchmark = Benchmark(new.blocks, new.queries, target=spec.target_recall)
        if is_flat or "hnsw_ef" in self._settings:
            measured = benchmark.measure(
                index, {"hnsw_ef": index.ef} if index.ef else {}
            )
        else:
            measured = tune(benchmark, index, index)
        write_json(new.folder / LOCATION, asdict(replace(location, hnsw_ef=index.ef)))
        logger.info("%s: %d vectors in %.1f s", location.collection, new.count, seconds)
        reason = (
            f"{'requested' if spec.kind != 'auto' else f'{new.count:,} vectors'}, in"
            " Qdrant"
        )
        measured["build_seconds"] = round(seconds, 1)
        return CreatedIndex(
            kind="Flat" if is_flat else f"HNSW{_DEGREE}",
            reason=reason,
            measured=measured,
        )

    def open(self, files: Files, kind: str = "") -> QdrantIndex:
        """Connect to the collection that `qdrant.json` names."""
        return QdrantIndex(QdrantLocation.read(files.get(LOCATION, Path(LOCATION))))

    def sync(
        self,
        name: str,
        version: int,
        versions: Mapping[int, Sequence[Files]],
    ) -> None:
        """Point the alias to the built collection of the current version, and drop
        those that no version names.
        """
        here = self._location
        prefix = collection_prefix(name)
        alias = f"{prefix}_current"
        try:
            locations = {
                number: [
                    QdrantLocation.read(files[LOCATION])
                    for files in parts
                    if LOCATION in files
                ]
                for number, parts in versions.items()
            }
            served = next(iter(locations.get(version, ())), None)
            client = connect(here)
            steps: list[Any] = []
            if any(known.alias_name == alias for known in client.get_aliases().aliases):
                steps.append(
                    models.DeleteAliasOperation(
                        delete_alias=models.DeleteAlias(alias_name=alias)
                    )
                )
            if served and served.location.rstrip("/") == here.rstrip("/"):
                create = models.CreateAlias(
                    collection_name=served.collection, alias_name=alias
                )
                steps.append(models.CreateAliasOperation(create_alias=create))
            if steps:
                call(lambda: client.update_collection_aliases(steps))  # all at once
            named = {
                location.collection
                for parts in locations.values()
                for location in parts
            }
            for collection in [
                known.name for known in client.get_collections().collections
            ]:
                match = re.fullmatch(rf"{prefix}_v(\d+)_[0-9a-f]+", collection)
                if match and int(match[1]) <= version and collection not in named:
                    client.delete_collection(collection)
        except Exception as error:
            logger.warning(
                "the Qdrant at %s could not be updated to version %d: %s",
                here,
                version,
                error,
            )

    def _fill(self, location: QdrantLocation, new: NewIndex) -> None:
        """Create a collection, upload points with their fields, and wait until they are
        indexed.
        """
        settings = self._settings
        name = location.collection
        client = connect(location.location)
        degree = _DEGREE if location.hnsw_ef else 0  # 0 builds no graph
        quantization: Any = (
            _QUANTIZATIONS[self._quantization] if location.is_quantized else None
        )
        create = partial(
            client.create_collection,
            name,
            models.VectorParams(size=new.dim, distance=models.Distance.DOT),
            hnsw_config=models.HnswConfigDiff(
                m=degree, ef_construct=_CONSTRUCTION_WIDTH
            ),
            shard_number=settings.get("shard_number"),
            replication_factor=settings.get("replication_factor"),
            quantization_config=quantization,
        )
        call(create, attempts=1)
        is_server = "://" in location.location
        for field, (key, kind) in location.fields.items():
            # before the points: the graph then has links for filters
            if is_server and field != _UNINDEXED:
                schema = models.PayloadSchemaType(_INDEXES.get(kind, "keyword"))
                call(partial(client.create_payload_index, name, key, schema))
        fields = new.fields.rename_columns([key for key, _ in location.fields.values()])
        row = 0
        for block in new.blocks():
            for start in range(0, len(block), BATCH):
                points = make_points(
                    np.asarray(block[start : start + BATCH]),
                    fields,
                    row,
                )
                call(partial(client.upsert, name, points))
                row += len(points)
        deadline = time.monotonic() + _INDEXING_SECONDS
        greens = 0
        while is_server and degree and greens < 2:  # the first may precede the graphs
            status = call(lambda: client.get_collection(name)).status
            greens = greens + 1 if status == models.CollectionStatus.GREEN else 0
            if status == models.CollectionStatus.RED or time.monotonic() > deadline:
                raise StoreUnavailableError(
                    f"Qdrant has not indexed {name}; it is {status.value}"
                )
            time.sleep(POLL_SECONDS)


def make_points(vectors: Floats, fields: pa.Table, row: int) -> list[Any]:
    """Return the points of vectors (n, E). fields: of all rows, by their keys. row: of
    the first vector.
    """
    records = fields.slice(row, len(vectors)).to_pylist()
    return [
        models.PointStruct(id=number, vector=vector, payload=_payload(record))
        for number, (vector, record) in enumerate(
            zip(vectors.tolist(), records, strict=True), row
        )
    ]


def _payload(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of one point. Numbers that are not finite are left out, since
    JSON has none.
    """
    for key in EMPTY_IS_MISSING:
        record[key] = record.get(key) or None
    return {
        key: value
        for key, value in record.items()
        if not (isinstance(value, float) and not math.isfinite(value))
    }


def collection_prefix(name: str) -> str:
    """Return the prefix of an index's collections. name: its absolute path or URL."""
    slug = re.sub(r"\W+", "_", name.rpartition("/")[2])[:40]
    return f"dcar_{slug}_{hashlib.sha256(name.encode()).hexdigest()[:6]}"
