"""Qdrant's HTTP interface as far as the engine uses it, over its client's local mode or over its core.

What the engine sends is parsed by the client's own models. `QDRANT_URL` names a real server for the tests instead.
"""

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from index_jobs.engines.qdrant.index import connect
from tests.support.qdrant_core import CoreClient

_CONFIG = {  # which the engine does not read
    "params": {}, "hnsw_config": {"m": 0, "ef_construct": 0, "full_scan_threshold": 0},
    "optimizer_config": {"deleted_threshold": 0, "vacuum_min_vector_number": 0, "default_segment_number": 0}
    | {"flush_interval_sec": 0},
}  # fmt: skip


class QdrantServer:
    """A server in this process.

    Attributes:
        failures: responses of the status `failure` to send next.
        calls: method, path and body of each request. keys: of each request.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """folder: with collections of the core; None for the local mode."""
        from qdrant_client import QdrantClient

        self.failures, self.failure, self.calls = 0, 503, list[tuple[str, str, Any]]()
        self.keys: list[str | None] = []
        self.client: Any = CoreClient(folder) if folder else QdrantClient(":memory:")
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def _respond(self) -> None:
                server.keys.append(self.headers.get("api-key"))
                length = int(self.headers.get("content-length", 0))
                status, result = server.respond(self.command, urlsplit(self.path).path, self.rfile.read(length))
                body = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = _respond  # noqa: N815

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        content = json.loads(body) if body else {}
        with self._lock:
            self.calls.append((method, path, content))
            if self.failures:
                self.failures -= 1
                return self.failure, None
            place = re.fullmatch(r"/collections/([^/]+)(/.*)?", path)
            name, rest = (place[1], place[2] or "") if place and place[1] != "aliases" else ("", path)
            if name and method + rest not in ("PUT", "GET/exists") and not self.client.collection_exists(name):
                return 404, None
            return 200, self._result(method + rest, name, content)

    def _result(self, route: str, name: str, body: Any) -> Any:
        from qdrant_client import models

        client, done = self.client, {"operation_id": 0, "status": "completed"}
        match route:
            case "GET/collections":
                return client.get_collections().model_dump()
            case "GET/aliases":
                return client.get_aliases().model_dump()
            case "POST/collections/aliases":
                return client.update_collection_aliases(models.ChangeAliasesOperation(**body).actions)
            case "PUT":
                given = models.CreateCollection(**body)
                return client.create_collection(name, given.vectors, hnsw_config=given.hnsw_config)
            case "DELETE":
                return client.delete_collection(name)
            case "GET":
                return {
                    "status": client.get_collection(name).status, "optimizer_status": "ok", "segments_count": 1,
                    "config": _CONFIG, "payload_schema": {},
                }  # fmt: skip
            case "GET/exists":
                return {"exists": client.collection_exists(name)}
            case "PUT/index":
                if isinstance(client, CoreClient):  # the local mode has none
                    given_index = models.CreateFieldIndex(**body)
                    client.create_payload_index(name, given_index.field_name, given_index.field_schema)
                return done
            case "PUT/points":
                client.upsert(name, models.PointsList(**body).points)
                return done
            case "POST/points/count":
                return client.count(name).model_dump()
            case "POST/facet":
                request = models.FacetRequest(**body)
                return client.facet(name, request.key, request.filter, request.limit, request.exact).model_dump()
            case "POST/points":
                points = client.retrieve(name, body["ids"], with_payload=False, with_vectors=True)
                return [point.model_dump(mode="json") for point in points]
            case "POST/points/query/batch":
                requests = [models.QueryRequest(**each) for each in body["searches"]]
                if not isinstance(client, CoreClient):
                    requests = [request.model_copy(update={"params": None}) for request in requests]
                found = client.query_batch_points(name, requests)
                return [
                    {"points": [{"id": p.id, "version": 0, "score": p.score} for p in each.points]} for each in found
                ]
        raise NotImplementedError(route)


@contextmanager
def running_server(folder: Path | None = None) -> Iterator[QdrantServer]:
    server = QdrantServer(folder)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


@contextmanager
def qdrant_url() -> Iterator[str]:
    """Yield the URL of a server: of QDRANT_URL, which is left as it was, or of one in this process."""
    if url := os.environ.get("QDRANT_URL"):
        from qdrant_client import QdrantClient

        made, create = set[str](), QdrantClient.create_collection

        def noted(client: Any, name: str, *given: Any, **options: Any) -> bool:
            made.add(name)
            return create(client, name, *given, **options)

        QdrantClient.create_collection = noted
        try:
            yield url
        finally:
            QdrantClient.create_collection = create
            for name in filter(connect(url).collection_exists, made):
                connect(url).delete_collection(name)
        return
    with running_server() as server:
        yield server.url
