"""A local server that speaks the chat protocol of vision endpoints and misbehaves on
request.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request for a draft or a judgement: its image (by a hash of the bytes) and
    its turn in the chat.
    """

    kind: str
    category: str
    image: str
    turn: int
    text: str  # of the last message
    body: dict[str, Any]
    headers: dict[str, str]
    at: float


@dataclass(frozen=True)
class Raw:
    """A response that is not simply a message.

    headers: instead of the usual ones, or as well. cut: promise all of the body and
    send half; silent: close at once; drip: seconds between bytes.
    """

    status: int = 200
    body: str | bytes = ""
    headers: tuple[tuple[str, str], ...] = ()
    cut: bool = False
    silent: bool = False
    wait: float = 0.0
    drip: float = 0.0


Behave = Callable[[Asked, int], "str | Raw | dict[str, Any]"]


def message(text: Any, finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": finish,
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20},
    } | more


def good(asked: Asked, _: int = 0) -> str:
    if asked.kind == "judge":
        return '{"accept": true, "feedback": ""}'
    return f"A {asked.category} on grass, number {asked.image[:6]}."


class VisionServer:
    """Serve what `behave(asked, n)` returns for request n (from 0) of the same kind,
    image and turn.
    """

    def __init__(self, behave: Behave = good) -> None:
        self.behave = behave
        self.asked = list[Asked]()
        self.at_once = self._under_way = 0  # the most requests at a time, and those now
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # a body would wait 40 ms until its head is acknowledged
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    outer._under_way += 1
                    outer.at_once = max(outer.at_once, outer._under_way)
                try:
                    outer._answer(self, body)
                finally:
                    with outer._lock:
                        outer._under_way -= 1

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # the client went away, as some tests want it

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "VisionServer":
        threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.01},
            daemon=True,
        ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def kinds(self) -> list[str]:
        return [asked.kind for asked in self.asked]

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        assert handler.path == "/v1/chat/completions"
        first = body["messages"][0]["content"]
        last = body["messages"][-1]["content"]
        kind = "judge" if "Answer with JSON" in first[0]["text"] else "draft"
        named = re.search(r'"([^"]+)"', first[0]["text"])
        image = hashlib.sha256(first[1]["image_url"]["url"].encode()).hexdigest()
        asked = Asked(
            kind,
            named[1] if named else "",
            image,
            len(body["messages"]) // 2,
            last if isinstance(last, str) else last[0]["text"],
            body,
            dict(handler.headers.items()),
            time.monotonic(),
        )
        with self._lock:
            n = sum(
                (a.kind, a.image, a.turn) == (kind, image, asked.turn)
                for a in self.asked
            )
            if kind == "judge":  # each draft is judged in a chat of its own
                n = sum(
                    (a.kind, a.image, a.text) == (kind, image, asked.text)
                    for a in self.asked
                )
            self.asked.append(asked)
        said = self.behave(asked, n)
        if isinstance(said, Raw):
            raw = said
        else:
            raw = Raw(body=json.dumps(message(said) if isinstance(said, str) else said))
        time.sleep(raw.wait)
        if raw.silent:
            handler.close_connection = True
            return
        content = raw.body.encode() if isinstance(raw.body, str) else raw.body
        handler.send_response(raw.status)
        usual = {
            "content-type": "application/json",
            "content-length": str(len(content)),
        }
        for name, value in (usual | dict(raw.headers)).items():
            handler.send_header(name, value)
        handler.end_headers()
        for byte in content if raw.drip else b"":
            handler.wfile.write(bytes([byte]))
            time.sleep(raw.drip)
        if not raw.drip:
            handler.wfile.write(content[: len(content) // 2] if raw.cut else content)
        handler.close_connection = handler.close_connection or raw.cut
