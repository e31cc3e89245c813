"""Models from the hub: the real client and open_clip in front of a server on
loopback.
"""

import hashlib
import http.server
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import open_clip
import pytest
from huggingface_hub import constants

from app.search import Index
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.catalogue import DEFAULT
from dcar_core.model.checkpoint import read_config
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.util.errors import HubUnavailableError, ModelError
from dcar_core.util.hub import fetch
from dcar_core.util.machine import WEIGHTS_FILE
from index_jobs.index.versions import open_current
from tests.support.commands import run
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.processes import answering, without_pytorch

COMMIT = "a" * 40
FILE = re.compile(
    r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)"
)

MAIN = """
import importlib
from huggingface_hub import constants
importlib.reload(constants)
from app.cli import main
main()
"""


class Hub(http.server.ThreadingHTTPServer):
    """Files by `owner/name/file`, for callers with the token, if there is one."""

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token = ""
        self.asked: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub = cast(Hub, self.server)
        hub.asked.append(self.path)
        match = FILE.fullmatch(self.path)
        if match is None:
            return self.answer(200 if self.path == "/" else 404, {})
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if not any(name.startswith(f"{match['repository']}/") for name in hub.files):
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        content = hub.files.get(f"{match['repository']}/{match['file']}")
        if content is None:
            return self.answer(
                404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            )
        return self.answer(
            200,
            {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            },
            content,
        )

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

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
    with hub_serving({f"org/tiny/{WEIGHTS_FILE}": b"weights"}) as served:
        for name, value in (
            ("HF_ENDPOINT", served.url),
            ("HF_HOME", str(tmp_path / "home")),
            ("HF_HUB_OFFLINE", "0"),
        ):
            monkeypatch.setenv(name, value)
        importlib.reload(constants)
        yield served
    monkeypatch.undo()
    importlib.reload(constants)


def test_a_file_is_downloaded_once_and_a_refusal_says_what_to_do(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "hf_right"
    for repository in ("org/tiny", "org/none"):
        with pytest.raises(
            ModelError, match=r"cannot be downloaded \(.*\): .* set HF_TOKEN to a token"
        ):
            fetch(repository, WEIGHTS_FILE)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    counts = list[int]()
    for _ in range(2):
        file = fetch("org/tiny", WEIGHTS_FILE)
        assert file is not None
        assert file.read_bytes() == b"weights"
        assert fetch("org/tiny", "tokenizer.json") is None
        counts.append(len(server.asked))
    assert counts[0] == counts[1]
    with pytest.raises(ModelError, match=f"hf-hub:org/tiny has no {MODEL_CONFIG}"):
        load_backbone(BackboneSource("hf-hub:org/tiny"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError):
        fetch("org/tiny", "merges.txt")


def test_a_command_downloads_a_model_and_starts_offline_with_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    files = {
        f"org/tiny/{file.name}": file.read_bytes() for file in tiny_model.iterdir()
    }
    with hub_serving(files) as server:
        environment = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        command = ["-c", MAIN, "zero-shot", "--model", "hf-hub:org/tiny", "--out"]
        done = run(*command, tmp_path / "first", environment=environment)
        assert done.returncode == 0, done.stderr
    offline = run(*command, tmp_path / "second", environment=environment)
    assert offline.stdout.replace("second", "first") == done.stdout
    elsewhere = environment | {"HF_HOME": str(tmp_path / "empty")}
    failed = run(*command, tmp_path / "third", environment=elsewhere)
    assert failed.returncode == 4
    assert (
        failed.stderr
        == f"error: {MODEL_CONFIG} of org/tiny is not cached, and the model hub cannot"
        " be reached: connect this machine, name a mirror by HF_ENDPOINT, or give a"
        " model's directory, such as --model examples/emoji/base\n"
    )


@needs("openvino")
def test_quickstart_fetches_a_model_and_indexes_without_torch(
    tiny_model: Path,
    photos: Path,
    tmp_path: Path,
) -> None:
    """It says first what it downloads. PyTorch finds the same backbone, and the same
    vectors.
    """
    repository = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    files = {
        f"{repository}/{file.name}": file.read_bytes() for file in tiny_model.iterdir()
    }
    main = (
        "from app.cli import serving\nserving.serve_index = lambda **settings:"
        f" None\n{MAIN}"
    )
    with hub_serving(files) as server:
        environment = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        environment |= without_pytorch(tmp_path)
        environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
        command = [
            sys.executable,
            "-c",
            main,
            "quickstart",
            str(photos),
            "--data",
            str(tmp_path / "data"),
        ]
        command += ["--runtime", "openvino"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | environment,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert (
        f"downloading {WEIGHTS_FILE} of {repository}, 14 MB"
        in done.stdout + done.stderr
    )
    (index,) = (tmp_path / "data" / "quickstart").glob("*/*")
    opened = Index.open(index, device="cpu", runtime="torch")
    published = open_current(index)
    described = read_config(published.checkpoint)["backbone"]
    assert described["model"] == DEFAULT.name
    assert described["pretrained"] == DEFAULT.pretrained
    assert (
        described["sha256"]
        == load_backbone(BackboneSource(str(tiny_model))).content_hash()
    )
    results = opened.search(image=photos / "owl" / "1.png", k=1)["results"]
    assert results[0]["score"] > 0.999


def test_a_tag_is_fetched_from_the_repository_that_open_clip_names(
    server: Hub,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = json.loads((tiny_model / MODEL_CONFIG).read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", config)
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED,
        "Tiny",
        {"tag": {"hf_hub": "org/tiny/"}},
    )
    server.files = {
        f"org/tiny/{WEIGHTS_FILE}": (tiny_model / WEIGHTS_FILE).read_bytes()
    }
    loaded = load_backbone(BackboneSource("Tiny", "tag"))
    local = load_backbone(BackboneSource("Tiny", str(tiny_model / WEIGHTS_FILE)))
    assert loaded.content_hash() == local.content_hash()
    server.asked.clear()
    load_backbone(BackboneSource("Tiny", "tag"))
    assert not server.asked
