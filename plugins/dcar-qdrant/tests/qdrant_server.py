"""Qdrant's HTTP interface over its core, as far as the engine uses it. The client's own
models parse what is sent.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qdrant_client import models
from qdrant_core import CoreClient

_CONFIG = {  # which the engine does not read
    "params": {},
    "hnsw_config": {"m": 0, "ef_construct": 0, "full_scan_threshold": 0},
    "optimizer_config": {
        "deleted_threshold": 0,
        "vacuum_min_vector_number": 0,
        "default_segment_number": 0,
    }
    | {"flush_interval_sec": 0},
}


class QdrantServer:
    """A server in this process.

    Attributes:
        failures: responses of the status `failure` to send next.
        calls: method, path and body of each request. keys: of each request.
    """

    def __init__(self, folder: Path) -> None:
        self.failures = 0
        self.failure = 503
        self.calls = list[tuple[str, str, Any]]()
        self.keys: list[str | None] = []
        self.client = CoreClient(folder)
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def _respond(self) -> None:
                server.keys.append(self.headers.get("api-key"))
                length = int(self.headers.get("content-length", 0))
                status, result = server.respond(
                    self.command,
                    urlsplit(self.path).path,
                    self.rfile.read(length),
                )
                body = json.dumps(
                    {"result": result, "status": "ok", "time": 0.0}
                ).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = _respond  # noqa: N815

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def searches(self) -> list[list[dict[str, Any]]]:
        """Return the searches of each call."""
        return [
            body["searches"] for _, path, body in self.calls if path.endswith("/batch")
        ]

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        content = json.loads(body) if body else {}
        with self._lock:
            self.calls.append((method, path, content))
            if self.failures:
                self.failures -= 1
                return self.failure, None
            place = re.fullmatch(r"/collections/([^/]+)(/.*)?", path)
            name, rest = (
                (place[1], place[2] or "")
                if place and place[1] != "aliases"
                else ("", path)
            )
            if (
                name
                and method + rest not in ("PUT", "GET/exists")
                and not self.client.collection_exists(name)
            ):
                return 404, None
            return 200, self._result(method + rest, name, content)

    def _result(self, route: str, name: str, body: Any) -> Any:
        client = self.client
        done = {"operation_id": 0, "status": "completed"}
        match route:
            case "GET/collections":
                return client.get_collections().model_dump()
            case "GET/aliases":
                return client.get_aliases().model_dump()
            case "POST/collections/aliases":
                return client.update_collection_aliases(
                    models.ChangeAliasesOperation(**body).actions
                )
            case "PUT":
                given = models.CreateCollection(**body)
                return client.create_collection(
                    name,
                    given.vectors,
                    hnsw_config=given.hnsw_config,
                )
            case "DELETE":
                return client.delete_collection(name)
            case "GET":
                return {
                    "status": client.get_collection(name).status,
                    "optimizer_status": "ok",
                    "segments_count": 1,
                    "config": _CONFIG,
                    "payload_schema": {},
                }
            case "GET/exists":
                return {"exists": client.collection_exists(name)}
            case "PUT/index":
                index = models.CreateFieldIndex(**body)
                client.create_payload_index(name, index.field_name, index.field_schema)
                return done
            case "PUT/points":
                client.upsert(name, models.PointsList(**body).points)
                return done
            case "POST/points/count":
                return client.count(name).model_dump()
            case "POST/points":
                return [
                    point.model_dump(mode="json")
                    for point in client.retrieve(name, body["ids"])
                ]
            case "POST/points/query/batch":
                found = client.query_batch_points(
                    name, [models.QueryRequest(**search) for search in body["searches"]]
                )
                return [
                    {
                        "points": [
                            {"id": p.id, "version": 0, "score": p.score}
                            for p in each.points
                        ]
                    }
                    for each in found
                ]
        raise NotImplementedError(route)


@contextmanager
def running_server(folder: Path) -> Iterator[QdrantServer]:
    server = QdrantServer(folder)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
        server.client.close()
