"""`dcar quickstart`: one command from a folder of images to a served index."""

import http.server
import json
import queue
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import open_clip
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from app.cli import app
from app.cli.options import EXAMPLES
from app.cli.quickstart import open_when_ready
from dcar_core.encoder.encoder import Encoder
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import read_config
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.model.recommended import DEFAULT, recommended_weights
from dcar_core.util.errors import DataError, HubUnavailableError, ModelError
from dcar_core.util.machine import WEIGHTS_FILE
from index_jobs.index.versions import open_current, read_manifest
from tests.support.commands import Command
from tests.support.files import write_tar
from tests.support.images import png
from tests.support.processes import answering, free_port


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    for name, colour in (("owls/barn_owl-3.png", "red"), ("owls/night/eagle.png", "blue"), ("cat.png", "green")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(colour))
    return folder


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings that the command would serve with; the hub cannot be reached."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("app.cli.quickstart.serve_index", lambda **flags: calls.append(flags))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return calls


def test_without_a_hub_the_bundled_model_indexes_and_serves_a_folder(
    photos: Path, tmp_path: Path, served: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    command = ["quickstart", str(photos), "--data", str(tmp_path / "data"), "--port", str(free_port()), "--no-open"]
    first = CliRunner().invoke(app, command, catch_exceptions=False)
    assert first.output.count("the model hub cannot be reached") == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "the hub's error is said once"
    assert "3 images, indexed in" in first.output
    steps = (
        "looking for images in", "1 of 3", "3 images; loading the model", "encode: 100%", "building the vector index",
        "indexing the words", "measuring the scores", "3 images, indexed",
    )  # fmt: skip
    told = first.output + caplog.text  # a handler of the command writes the log to stderr
    assert [step for step in steps if step not in told] == []
    assert re.findall(r"^\d of 3: \w+", first.output, re.MULTILINE) == [
        "1 of 3: model",
        "2 of 3: index",
        "3 of 3: serve",
    ]
    assert f"dcar train --data '{photos}' --model " in first.output
    (flags,) = served
    artifact = open_current(flags["index"])
    assert read_config(artifact.checkpoint)["training"]["note"].startswith("This model knows emoji, not photos.")
    assert flags["index"].name == "my photos"
    items = {each.category: each for each in map(artifact.item, range(artifact.rows))}
    assert set(items) == {"owls", "owls/night", ""}
    assert (items["owls"].caption, items["owls"].metadata["title"]) == ("", "barn owl-3")
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "3 images, already indexed" in again.output
    assert open_current(served[1]["index"]).manifest.version == artifact.manifest.version
    (photos / "cat.png").unlink()
    assert "2 images, indexed in" in CliRunner().invoke(app, command, catch_exceptions=False).output


def test_broken_images_are_counted_and_captions_are_what_the_model_is_adapted_to(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages, port = queue.Queue[str](), free_port()
    monkeypatch.setattr("app.cli.quickstart.has_browser", lambda: True)
    monkeypatch.setattr("app.cli.quickstart.open_when_ready", pages.put)
    (photos / "broken.png").write_bytes(png()[:40])
    (photos / "pairs.csv").write_text("image,caption\ncat.png,a green cat\n")
    command = ["quickstart", str(photos), "--model", str(EXAMPLES / "base"), "--data", str(tmp_path / "data")]
    done = CliRunner().invoke(app, [*command, "--port", str(port)], catch_exceptions=False)
    assert pages.get(timeout=10) == f"http://127.0.0.1:{port}/"
    assert "broken images, left out: 1, with reasons in " in done.output
    assert f"dcar train --data '{photos}' --model " in done.output
    assert f"--validation '{photos}'\n" in done.output


def test_no_file_is_advised_inside_of_a_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "plain.tar", {"cat.png": png("green"), "dog.png": png("red")})
    command = ["quickstart", str(tmp_path / "plain.tar"), "--model", str(EXAMPLES / "base"), "--no-open"]
    options = ["--data", str(tmp_path / "data"), "--port", str(free_port())]
    done = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    assert "plain.tar/" not in done.output
    assert "write a table of captions" in done.output


def test_the_page_is_opened_once_the_service_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses, pages = [503, 200], list[str]()

    class Service(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0))
            self.end_headers()

    monkeypatch.setattr("webbrowser.open", pages.append)
    server = http.server.HTTPServer(("127.0.0.1", 0), Service)
    url = f"http://127.0.0.1:{server.server_port}/"
    with answering(server):
        open_when_ready(url)
    assert (pages, statuses) == ([url], [])


def test_without_a_hub_a_model_is_looked_for_in_the_cache_alone(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["zero-shot", "--out", str(tmp_path / "clip")])
    assert isinstance(done.exception, HubUnavailableError)
    assert "open_clip_model.safetensors of laion/CLIP-ViT-B-32-laion2B-s34B-b79K is not cached" in str(done.exception)


@pytest.mark.parametrize("model", ["model", "models/mistyped", "ViT-B-23", "ViT-B-32 --pretrained opnai"])
def test_a_model_that_the_hub_does_not_have_is_not_replaced(
    model: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    command = ["quickstart", str(photos), "--data", "data", "--port", str(free_port()), "--model", *model.split()]
    assert isinstance(CliRunner().invoke(app, command).exception, ModelError)


def test_the_named_files_of_a_model_are_what_the_index_is_made_with(
    photos: Path, tiny_model: Path, tmp_path: Path, served: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(weights: Path) -> None:
        changed = {name: np.asarray(weight + 0.01) for name, weight in load_file(weights).items()}
        weights.unlink()  # an encoder may still have the file mapped into memory
        save_file(changed, weights)

    def indexed(*model: str) -> str:
        command = ["quickstart", str(photos), "--model", *model, "--data", str(tmp_path / "data"), "--no-open"]
        done = CliRunner().invoke(app, [*command, "--port", str(free_port())], catch_exceptions=False)
        artifact = open_current(served[-1]["index"])
        artifact.require(Encoder.load(artifact.checkpoint).fingerprint)
        used = read_config(artifact.checkpoint)["backbone"]
        assert used["sha256"] == load_backbone(BackboneSource(used["model"], used["pretrained"])).content_hash()
        return ("reused: " if "already indexed" in done.output else "made: ") + (used["pretrained"] or used["model"])

    first, second = (shutil.copytree(tiny_model, tmp_path / version / "clip") for version in ("v1", "v2"))
    change(second / WEIGHTS_FILE)
    assert indexed(str(first)) == f"made: {first}"
    assert indexed(str(first)) == f"reused: {first}"
    assert indexed(str(second)) == f"made: {second}"
    change(second / WEIGHTS_FILE)
    assert indexed(str(second)) == f"made: {second}"
    assert len(list((tmp_path / "data" / "zero-shot").iterdir())) == 2

    config = json.loads((tiny_model / MODEL_CONFIG).read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", config)
    weights = first / WEIGHTS_FILE
    assert indexed("Tiny", "--pretrained", str(weights)) == f"made: {weights}"
    change(weights)
    assert indexed("Tiny", "--pretrained", str(weights)) == f"made: {weights}"


def test_a_directory_with_the_name_of_a_model_has_weights_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recommended_weights(DEFAULT.name) == DEFAULT.pretrained
    (tmp_path / DEFAULT.name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert recommended_weights(DEFAULT.name) is None


def test_a_missing_folder_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["quickstart", str(tmp_path / "none"), "--port", str(free_port())])
    assert isinstance(done.exception, DataError)
    assert "there is no gallery" in str(done.exception)
    done = CliRunner().invoke(app, ["quickstart", str(tmp_path), "--port", str(free_port())])
    assert "is empty" in str(done.exception)
    assert "1 of 3" not in done.output


def test_a_photo_that_is_added_while_it_serves_is_found(photos: Path, tiny_model: Path, tmp_path: Path) -> None:
    port, found, end = free_port(), set[str](), time.monotonic() + 60
    options = ["--watch", "--model", tiny_model, "--data", tmp_path / "data", "--port", port, "--no-open"]
    process = Command("app.cli", "quickstart", photos, *options)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            while "herons" not in found:
                assert time.monotonic() < end
                time.sleep(0.1)
                with suppress(httpx.TransportError):
                    body = client.post("/search/text", json={"query": "bird"}).json()
                    found = {each["category"] for each in body.get("results", ())}
                if found and not (photos / "herons").exists():
                    (photos / "herons").mkdir()
                    (photos / "herons" / "heron.png").write_bytes(png("navy"))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(30)
    assert process.returncode == 0
    (index,) = (path.parents[1] for path in (tmp_path / "data").rglob("versions/2.json"))
    assert read_manifest(index, 2).change == "1 image added by a watch"
