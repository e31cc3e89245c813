"""Qdrant's own core in this process, with the methods of its client that the engine uses.

The client's local mode is a second implementation, in Python. This one is what servers run: it builds graphs, indexes
fields and evaluates filters in Rust. Its Python package reads true as 1 in conditions, so true and false are stored as
1 and 0 here.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class CoreClient:
    """Collections in folders, each one shard. Searches use one thread each."""

    def __init__(self, folder: Path) -> None:
        """Open the collections of a folder, as a server does when it starts."""
        import qdrant_edge

        self._core, self._folder, self._aliases = qdrant_edge, folder, dict[str, str]()
        self._shards = {path.name: qdrant_edge.EdgeShard.load(str(path)) for path in sorted(folder.iterdir())}

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def get_collections(self) -> Any:
        from qdrant_client import models

        collections = [models.CollectionDescription(name=each) for each in self._shards]
        return models.CollectionsResponse(collections=collections)

    def get_aliases(self) -> Any:
        from qdrant_client import models

        aliases = [models.AliasDescription(alias_name=a, collection_name=c) for a, c in self._aliases.items()]
        return models.CollectionsAliasesResponse(aliases=aliases)

    def update_collection_aliases(self, steps: Any) -> bool:
        for step in steps:
            if deleted := getattr(step, "delete_alias", None):
                del self._aliases[deleted.alias_name]
            else:
                self._aliases[step.create_alias.alias_name] = step.create_alias.collection_name
        return True

    def collection_exists(self, name: str) -> bool:
        return name in self._shards

    def create_collection(self, name: str, vectors: Any, *, hnsw_config: Any, **_: Any) -> bool:
        core, path = self._core, self._folder / name
        path.mkdir()
        graph = core.HnswIndexConfig(m=hnsw_config.m, ef_construct=hnsw_config.ef_construct, full_scan_threshold=10_000)
        dense = core.EdgeVectorParams(size=vectors.size, distance=core.Distance.Dot, hnsw_config=graph)
        self._shards[name] = core.EdgeShard.create(str(path), core.EdgeConfig(vectors=dense))
        return True

    def delete_collection(self, name: str) -> bool:
        self._shards.pop(name).close()
        shutil.rmtree(self._folder / name)
        return True

    def create_payload_index(self, name: str, key: str, schema: Any) -> None:
        kind = getattr(self._core.PayloadSchemaType, schema.value.replace("bool", "integer").title())
        self._shards[name].update(self._core.UpdateOperation.create_field_index(key, kind))

    def upsert(self, name: str, points: Any) -> None:
        stored = [self._core.Point(each.id, each.vector, _without_bools(each.payload)) for each in points]
        self._shards[name].update(self._core.UpdateOperation.upsert_points(stored))

    def get_collection(self, name: str) -> Any:
        """Build what is to be built."""
        from qdrant_client import models

        self._shards[name].optimize()
        self._shards[name].flush()
        return SimpleNamespace(status=models.CollectionStatus.GREEN)

    def count(self, name: str, **_: Any) -> Any:
        from qdrant_client import models

        return models.CountResult(count=self._shards[name].count(self._core.CountRequest(exact=True)))

    def facet(self, name: str, key: str, conditions: Any, limit: int, exact: bool, **_: Any) -> Any:
        from qdrant_client import models

        filter = self._condition(conditions) if conditions else None
        hits = self._shards[name].facet(self._core.FacetRequest(key, limit, exact, filter)).hits
        return models.FacetResponse(hits=[models.FacetValueHit(value=hit.value, count=hit.count) for hit in hits])

    def retrieve(self, name: str, ids: Any, **_: Any) -> Any:
        from qdrant_client import models

        found = self._shards[name].retrieve(ids, with_payload=False, with_vector=True)
        return [models.Record(id=each.id, vector=each.vector) for each in found]

    def query_batch_points(self, name: str, requests: Any, **_: Any) -> Any:
        core, found = self._core, []
        for each in requests:
            width = {"hnsw_ef": each.params.hnsw_ef, "exact": bool(each.params.exact)} if each.params else {}
            request = core.QueryRequest(
                limit=each.limit, params=core.SearchParams(**width),
                query=core.Query.Nearest(getattr(each.query, "nearest", each.query)),
                filter=self._condition(each.filter) if each.filter else None, with_payload=False,
            )  # fmt: skip
            found.append(SimpleNamespace(points=self._shards[name].query(request)))
        return found

    def _condition(self, given: Any) -> Any:
        from qdrant_client import models

        core = self._core
        match given:
            case models.Filter():
                parts = (given.must, given.should, given.must_not)
                return core.Filter(*(part and [self._condition(each) for each in part] for part in parts))
            case models.HasIdCondition():
                return core.HasIdCondition(set(given.has_id))
            case models.IsNullCondition():
                return core.IsNullCondition(given.is_null.key)
            case models.FieldCondition(match=models.MatchAny()):
                return core.FieldCondition(given.key, match=core.MatchAny(given.match.any))
            case models.FieldCondition(match=models.MatchValue()):
                return core.FieldCondition(given.key, match=core.MatchValue(int(given.match.value)))
            case models.FieldCondition():
                limits = given.range.model_dump(exclude_none=True)
                return core.FieldCondition(given.key, range=core.RangeFloat(**limits))
        raise NotImplementedError(given)


def _without_bools(payload: dict[str, Any]) -> dict[str, Any]:
    return {key: int(value) if isinstance(value, bool) else value for key, value in payload.items()}
