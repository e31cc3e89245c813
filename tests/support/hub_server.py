"""A local server that speaks the protocol of the Hugging Face hub for a few files, and misbehaves on request."""

import hashlib
import http.server
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tests.support.processes import answering

COMMIT = "a" * 40
_FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class HubServer:
    """Files by `owner/name/file`, and what is wrong with the server.

    Attributes:
        token: what a caller must send to read anything; empty for public files.
        refused_as: the hub's name for the refusal of a caller without a token.
        stalls: accept requests and never answer.
        cut: bytes of the body after which a download breaks off, once for each entry.
        asked: path of each request.
    """

    files: Mapping[str, bytes]
    token: str = ""
    refused_as: str = "GatedRepo"
    stalls: bool = False
    cut: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def hub_serving(files: Mapping[str, bytes]) -> Iterator[HubServer]:
    """Serve files on loopback; `HF_ENDPOINT` is the server's `url`."""
    hub = HubServer(files)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            hub.asked.append(self.path)
            if hub.stalls:
                time.sleep(1)
                return None
            given = self.headers.get("Authorization")
            if hub.token and given != f"Bearer {hub.token}":
                wrong = {"X-Error-Message": "Invalid credentials in Authorization header"}
                return self._send(401, wrong if given else {"X-Error-Code": hub.refused_as}, b"")
            match = _FILE.fullmatch(self.path)
            if match is None:
                return self._send(200 if self.path == "/" else 404, {}, b"")
            repository = match["repository"]
            if not any(name.startswith(f"{repository}/") for name in hub.files):
                return self._send(404, {"X-Error-Code": "RepoNotFound"}, b"")
            content = hub.files.get(f"{repository}/{match['file']}")
            if content is None:
                return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            start = int(re.findall(r"\d+", self.headers.get("Range") or "0")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._send(206 if start else 200, headers | {"Accept-Ranges": "bytes"}, content[start:])

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            end = hub.cut.pop(0) if hub.cut and len(body) > hub.cut[0] else len(body)
            with suppress(ConnectionError):  # a client that gave up
                self.wfile.write(body[:end])
            self.close_connection = end < len(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    with answering(server):
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
