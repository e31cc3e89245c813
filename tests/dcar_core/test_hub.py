"""Models from the hub: the real client and open_clip in front of a server on loopback."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
from huggingface_hub import constants

from dcar_core.model import hub
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.model.hub import fetch, hub_is_reachable
from dcar_core.util.errors import HubUnavailableError, ModelError
from dcar_core.util.memory import WEIGHTS_FILE
from tests.support.commands import run
from tests.support.hub_server import HubServer, hub_serving

CONTENT = bytes(range(256)) * 400
CHUNK = 10_000
# The library reads its environment when it is imported, which it is already where commands are forked from.
MAIN = """
import importlib
from huggingface_hub import constants
importlib.reload(constants)
from app.cli import main
main()
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with one file, which this process downloads from, and an empty cache."""
    with hub_serving({f"org/tiny/{WEIGHTS_FILE}": CONTENT}) as served:
        for name, value in (("HF_ENDPOINT", served.url), ("HF_HOME", str(tmp_path / "home")), ("HF_HUB_OFFLINE", "0")):
            monkeypatch.setenv(name, value)
        importlib.reload(constants)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
        yield served
    monkeypatch.undo()
    importlib.reload(constants)


def refusal(*names: str) -> str:
    with pytest.raises(ModelError) as raised:
        fetch("org/tiny", *(names or [WEIGHTS_FILE]))
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_file_is_downloaded_once_and_found_without_the_hub(server: HubServer) -> None:
    found = fetch("org/tiny", WEIGHTS_FILE)
    assert found is not None
    assert found.read_bytes() == CONTENT
    server.asked.clear()
    assert fetch("org/tiny", WEIGHTS_FILE) == found
    assert not server.asked
    assert fetch("org/tiny", "tokenizer.json") is None
    asked = len(server.asked)
    assert fetch("org/tiny", "tokenizer.json") is None
    assert len(server.asked) == asked


def test_a_broken_connection_says_what_to_do(server: HubServer) -> None:
    server.cut = [25_000, *[0] * 5]
    assert refusal().endswith(": run the same command again")
    found = fetch("org/tiny", WEIGHTS_FILE)
    assert found is not None
    assert found.read_bytes() == CONTENT


def test_a_private_repository_asks_for_a_token_and_takes_it(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "hf_right"
    assert f"accept them at {server.url}/org/tiny, and set HF_TOKEN" in refusal()
    server.refused_as = "RepoNotFound"  # the hub hides what is private
    assert "is not on the hub, or is private" in refusal()
    server.refused_as = ""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert re.search("responds with 401: set HF_TOKEN", refusal())
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert fetch("org/tiny", WEIGHTS_FILE) is not None


def test_what_the_hub_does_not_have_is_named(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=f"hf-hub:org/tiny has no {MODEL_CONFIG}"):
        load_backbone(BackboneSource("hf-hub:org/tiny"))
    with pytest.raises(ModelError, match=f"{MODEL_CONFIG} of org/none is not on the hub, or is private"):
        load_backbone(BackboneSource("hf-hub:org/none"))


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
    server: HubServer, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
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


def test_the_hub_is_reachable_if_it_responds_at_all(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "needed"
    assert hub_is_reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_is_reachable()
    with pytest.raises(HubUnavailableError):
        fetch("org/tiny", WEIGHTS_FILE)


def test_a_hub_that_never_responds_is_known_in_time(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.TIMEOUT_S <= 5
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
    server.stalls = True
    assert not hub_is_reachable()
