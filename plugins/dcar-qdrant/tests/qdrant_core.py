"""Qdrant's own core in this process, with the methods of its client that the engine
uses.

The client's local mode is a second implementation, in Python. This one is what servers
run: it builds graphs, indexes fields and evaluates filters in Rust. Its Python package
reads true as 1 in conditions, so true and false are stored as 1 and 0 here.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import qdrant_edge
from qdrant_client import models

core: Any = qdrant_edge


class CoreClient:
    """Collections in folders, each one shard. Searches use one thread each."""

    def __init__(self, folder: Path) -> None:
        """Open the collections of a folder, as a server does when it starts."""
        self._folder = folder
        self._aliases = dict[str, str]()
        self._shards = {
            path.name: core.EdgeShard.load(str(path))
            for path in sorted(folder.iterdir())
        }

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def get_collections(self) -> Any:
        collections = [
            models.CollectionDescription(name=shard) for shard in self._shards
        ]
        return models.CollectionsResponse(collections=collections)

    def get_aliases(self) -> Any:
        aliases = [
            models.AliasDescription(alias_name=a, collection_name=c)
            for a, c in self._aliases.items()
        ]
        return models.CollectionsAliasesResponse(aliases=aliases)

    def update_collection_aliases(self, steps: Any) -> bool:
        for step in steps:
            if deleted := getattr(step, "delete_alias", None):
                del self._aliases[deleted.alias_name]
            else:
                self._aliases[step.create_alias.alias_name] = (
                    step.create_alias.collection_name
                )
        return True

    def collection_exists(self, name: str) -> bool:
        return name in self._shards

    def create_collection(
        self,
        name: str,
        vectors: Any,
        *,
        hnsw_config: Any,
        **_: Any,
    ) -> bool:
        (path := self._folder / name).mkdir()
        graph = core.HnswIndexConfig(
            m=hnsw_config.m,
            ef_construct=hnsw_config.ef_construct,
            full_scan_threshold=10_000,
        )
        dense = core.EdgeVectorParams(
            size=vectors.size,
            distance=core.Distance.Dot,
            hnsw_config=graph,
        )
        self._shards[name] = core.EdgeShard.create(
            str(path), core.EdgeConfig(vectors=dense)
        )
        return True

    def delete_collection(self, name: str) -> bool:
        self._shards.pop(name).close()
        shutil.rmtree(self._folder / name)
        return True

    def create_payload_index(self, name: str, key: str, schema: Any) -> None:
        kind = getattr(
            core.PayloadSchemaType, schema.value.replace("bool", "integer").title()
        )
        self._shards[name].update(core.UpdateOperation.create_field_index(key, kind))

    def upsert(self, name: str, points: Any) -> None:
        stored = [
            core.Point(point.id, point.vector, _without_bools(point.payload))
            for point in points
        ]
        self._shards[name].update(core.UpdateOperation.upsert_points(stored))

    def delete(self, name: str, ids: list[int]) -> None:
        self._shards[name].update(core.UpdateOperation.delete_points(ids))

    def get_collection(self, name: str) -> Any:
        """Build what is to be built."""
        self._shards[name].optimize()
        self._shards[name].flush()
        return SimpleNamespace(status=models.CollectionStatus.GREEN)

    def count(self, name: str, **_: Any) -> Any:
        return models.CountResult(
            count=self._shards[name].count(core.CountRequest(exact=True))
        )

    def retrieve(self, name: str, ids: Any, **_: Any) -> Any:
        found = self._shards[name].retrieve(ids, with_payload=False, with_vector=True)
        return [models.Record(id=each.id, vector=each.vector) for each in found]

    def query_batch_points(self, name: str, requests: Any, **_: Any) -> Any:
        found = []
        for each in requests:
            request = core.QueryRequest(
                limit=each.limit,
                with_payload=False,
                params=core.SearchParams(
                    hnsw_ef=each.params.hnsw_ef, exact=bool(each.params.exact)
                ),
                query=core.Query.Nearest(getattr(each.query, "nearest", each.query)),
                filter=self._condition(each.filter) if each.filter else None,
            )
            found.append(SimpleNamespace(points=self._shards[name].query(request)))
        return found

    def _condition(self, given: Any) -> Any:
        match given:
            case models.Filter():
                parts = (given.must, given.should, given.must_not)
                return core.Filter(
                    *(
                        part and [self._condition(each) for each in part]
                        for part in parts
                    )
                )
            case models.HasIdCondition():
                return core.HasIdCondition(set(given.has_id))
            case models.IsNullCondition():
                return core.IsNullCondition(given.is_null.key)
            case models.FieldCondition(match=models.MatchAny()):
                return core.FieldCondition(
                    given.key, match=core.MatchAny(given.match.any)
                )
            case models.FieldCondition(match=models.MatchValue()):
                return core.FieldCondition(
                    given.key, match=core.MatchValue(int(given.match.value))
                )
            case models.FieldCondition():
                limits = given.range.model_dump(exclude_none=True)
                return core.FieldCondition(given.key, range=core.RangeFloat(**limits))
        raise NotImplementedError(given)


def _without_bools(payload: dict[str, Any]) -> dict[str, Any]:
    return {
        key: int(value) if isinstance(value, bool) else value
        for key, value in payload.items()
    }
