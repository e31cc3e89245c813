"""Models from the hub: the real client and open_clip in front of a server on loopback that misbehaves on request."""

import hashlib
import http.server
import importlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import open_clip
import pytest
from huggingface_hub import constants

from dcar_core.model import hub
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.model.hub import fetch, hub_is_reachable
from dcar_core.util.errors import HubUnavailableError, ModelError
from dcar_core.util.machine import WEIGHTS_FILE
from tests.support.commands import run
from tests.support.processes import answering

COMMIT = "a" * 40
FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
CONTENT = bytes(range(256)) * 400

MAIN = """
import importlib
from huggingface_hub import constants
importlib.reload(constants)
from app.cli import main
main()
"""


class Hub(http.server.ThreadingHTTPServer):
    """Files by `owner/name/file`, and what is wrong with the server.

    token: what a caller must send to read anything. refused_as: the hub's name for the refusal of one without it.
    stalls: accept requests and never answer. cut: bytes after which a download breaks off, once for each entry.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.url = files, f"http://127.0.0.1:{self.server_port}"
        self.token, self.refused_as, self.stalls = "", "GatedRepo", False
        self.cut: list[int] = []
        self.asked: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub = cast(Hub, self.server)
        hub.asked.append(self.path)
        if hub.stalls:
            time.sleep(1)
            return None
        given = self.headers.get("Authorization")
        if hub.token and given != f"Bearer {hub.token}":
            wrong = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self.answer(401, wrong if given else {"X-Error-Code": hub.refused_as})
        match = FILE.fullmatch(self.path)
        if match is None:
            return self.answer(200 if self.path == "/" else 404, {})
        if not any(name.startswith(f"{match['repository']}/") for name in hub.files):
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        content = hub.files.get(f"{match['repository']}/{match['file']}")
        if content is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        start = int(re.findall(r"\d+", self.headers.get("Range") or "0")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.answer(206 if start else 200, headers, content[start:])

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            cut = cast(Hub, self.server).cut
            end = cut.pop(0) if cut and len(body) > cut[0] else len(body)
            with suppress(ConnectionError):  # a client that gave up
                self.wfile.write(body[:end])
            self.close_connection = end < len(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub_serving(files: Mapping[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)
    with answering(hub):
        yield hub


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one file, which this process downloads from, and an empty cache."""
    with hub_serving({f"org/tiny/{WEIGHTS_FILE}": CONTENT}) as served:
        for name, value in (("HF_ENDPOINT", served.url), ("HF_HOME", str(tmp_path / "home")), ("HF_HUB_OFFLINE", "0")):
            monkeypatch.setenv(name, value)
        importlib.reload(constants)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
        monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
        yield served
    monkeypatch.undo()
    importlib.reload(constants)


def refusal() -> str:
    with pytest.raises(ModelError) as raised:
        fetch("org/tiny", WEIGHTS_FILE)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def downloaded() -> bytes:
    found = fetch("org/tiny", WEIGHTS_FILE)
    assert found is not None
    return found.read_bytes()


def test_a_file_is_downloaded_once_also_after_a_broken_connection(server: Hub) -> None:
    server.cut = [25_000, *[0] * 5]
    assert refusal().endswith(": run the same command again")
    assert downloaded() == CONTENT
    server.asked.clear()
    assert downloaded() == CONTENT
    assert not server.asked
    assert fetch("org/tiny", "tokenizer.json") is None
    asked = len(server.asked)
    assert fetch("org/tiny", "tokenizer.json") is None
    assert len(server.asked) == asked


def test_what_is_private_or_not_there_says_what_to_do(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=f"hf-hub:org/tiny has no {MODEL_CONFIG}"):
        load_backbone(BackboneSource("hf-hub:org/tiny"))
    with pytest.raises(ModelError, match=f"{MODEL_CONFIG} of org/none is not on the hub, or is private"):
        load_backbone(BackboneSource("hf-hub:org/none"))
    server.token = "hf_right"
    assert f"accept them at {server.url}/org/tiny, and set HF_TOKEN" in refusal()
    server.refused_as = "RepoNotFound"  # the hub hides what is private
    assert "is not on the hub, or is private" in refusal()
    server.refused_as = ""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "responds with 401: set HF_TOKEN" in refusal()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert downloaded() == CONTENT


def test_a_command_downloads_a_model_and_starts_offline_with_it(tiny_model: Path, tmp_path: Path) -> None:
    files = {f"org/tiny/{file.name}": file.read_bytes() for file in tiny_model.iterdir()}
    with hub_serving(files) as server:
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = ["-c", MAIN, "zero-shot", "--model", "hf-hub:org/tiny", "--out"]
        full = run(*command, tmp_path / "full", environment=environment, file_size=1_000_000)
        assert (full.returncode, full.stderr.count("error: ")) == (4, 1)
        assert "does not fit in" in full.stderr
        done = run(*command, tmp_path / "first", environment=environment)
        assert done.returncode == 0, done.stderr
    offline = run(*command, tmp_path / "second", environment=environment)
    assert offline.stdout.replace("second", "first") == done.stdout
    elsewhere = environment | {"HF_HOME": str(tmp_path / "empty")}
    failed = run(*command, tmp_path / "third", environment=elsewhere)
    assert failed.returncode == 4
    assert failed.stderr == (
        f"error: {MODEL_CONFIG} of org/tiny is not cached, and the model hub cannot be reached: connect this machine, "
        "name a mirror by HF_ENDPOINT, or give a model's directory, such as --model examples/emoji/base\n"
    )


def test_a_tag_is_fetched_from_the_repository_that_open_clip_names(
    server: Hub, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((tiny_model / MODEL_CONFIG).read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", {"tag": {"hf_hub": "org/tiny/"}})
    server.files = {f"org/tiny/{WEIGHTS_FILE}": (tiny_model / WEIGHTS_FILE).read_bytes()}
    loaded = load_backbone(BackboneSource("Tiny", "tag"))
    local = load_backbone(BackboneSource("Tiny", str(tiny_model / WEIGHTS_FILE)))
    assert loaded.content_hash() == local.content_hash()
    server.asked.clear()
    load_backbone(BackboneSource("Tiny", "tag"))
    assert not server.asked


def test_the_hub_is_reachable_if_it_responds_in_time(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.TIMEOUT_S <= 5
    server.token = "needed"
    assert hub_is_reachable()
    with monkeypatch.context() as patch:
        patch.setattr(hub, "TIMEOUT_S", 0.2)
        server.stalls = True
        assert not hub_is_reachable()
    server.stalls = False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_is_reachable()
    with pytest.raises(HubUnavailableError):
        fetch("org/tiny", WEIGHTS_FILE)
