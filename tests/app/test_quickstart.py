"""`dcar quickstart`: one command from a folder of images to a served index."""

import json
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from app.cli import app
from dcar_core.encoder.encoder import Encoder
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.catalogue import DEFAULT, recommended_weights
from dcar_core.model.checkpoint import read_config
from dcar_core.model.config import MODEL_CONFIG
from dcar_core.util.errors import DcarError, HubUnavailableError, ModelError
from dcar_core.util.machine import WEIGHTS_FILE
from index_jobs.index.versions import current_version, open_current, read_manifest
from index_jobs.jobs.update import remove
from tests.support.images import png
from tests.support.parts import needs
from tests.support.processes import free_port


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    for name, colour in (
        ("owls/barn_owl-3.png", "red"),
        ("owls/night/eagle.png", "blue"),
        ("cat.png", "green"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(colour))
    return folder


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings that the command would serve with; the hub cannot be reached."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "app.cli.serving.serve_index", lambda **flags: calls.append(flags)
    )
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return calls


def quickstart(
    gallery: Path,
    *options: object,
    data: Path = Path("data"),
    fails: bool = False,
) -> Result:
    command = ["quickstart", gallery, "--data", data, "--port", free_port(), *options]
    return CliRunner().invoke(app, [*map(str, command)], catch_exceptions=fails)


def test_without_a_hub_the_bundled_model_indexes_and_serves_a_folder(
    photos: Path,
    tmp_path: Path,
    served: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (photos / "broken.png").write_bytes(png()[:40])
    first = quickstart(photos, data=tmp_path / "data")
    assert first.exit_code == 0
    assert (
        "the model hub cannot be reached, so the bundled model is used" in first.output
    )
    assert "broken images, left out: 1, with reasons in " in first.output
    assert [
        line.split(" ", 4)[:4]
        for line in first.output.splitlines()
        if " of 3: " in line
    ] == [
        ["1", "of", "3:", "model"],
        ["2", "of", "3:", "index"],
        ["3", "of", "3:", "serve"],
    ]
    (flags,) = served
    opened = open_current(flags["index"])
    assert read_config(opened.checkpoint)["training"]["note"].startswith(
        "This model knows emoji, not photos."
    )
    assert flags["index"].name == "my photos"
    items = {item.category: item for item in map(opened.item, range(opened.rows))}
    assert set(items) == {"owls", "owls/night", ""}
    assert items["owls"].caption == ""
    assert items["owls"].metadata["title"] == "barn owl-3"
    assert (
        "3 images, already indexed" in quickstart(photos, data=tmp_path / "data").output
    )
    assert open_current(served[1]["index"]).manifest.version == opened.manifest.version
    (photos / "cat.png").unlink()
    assert "2 images, indexed in" in quickstart(photos, data=tmp_path / "data").output
    moved = photos.rename(tmp_path / "elsewhere")
    before = served[-1]["index"]
    with caplog.at_level("INFO"):
        assert (
            "its vectors are taken over"
            in quickstart(moved, data=tmp_path / "data").output
        )
    assert "2 of 3 images have vectors already" in caplog.text
    assert not before.exists()
    assert "holds the gallery as it is" not in caplog.text


def test_without_a_hub_a_model_is_looked_for_in_the_cache_alone(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["zero-shot", "--out", str(tmp_path / "clip")])
    assert isinstance(done.exception, HubUnavailableError)
    assert (
        "open_clip_model.safetensors of laion/CLIP-ViT-B-32-laion2B-s34B-b79K is not"
        " cached" in str(done.exception)
    )


@pytest.mark.parametrize(
    "model", ["model", "models/mistyped", "ViT-B-23", "ViT-B-32 --pretrained opnai"]
)
def test_a_model_that_the_hub_does_not_have_is_not_replaced(
    model: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert recommended_weights(DEFAULT.name) == DEFAULT.pretrained
    monkeypatch.chdir(tmp_path)
    Path(DEFAULT.name).mkdir()
    assert recommended_weights(DEFAULT.name) is None, (
        "a directory has weights of its own"
    )
    Path("model").mkdir()
    Path("model/open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    assert isinstance(
        quickstart(photos, "--model", *model.split(), fails=True).exception, ModelError
    )


def test_the_named_files_of_a_model_are_what_the_index_is_made_with(
    photos: Path,
    tiny_model: Path,
    tmp_path: Path,
    served: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(weights: Path) -> None:
        changed = {
            name: np.asarray(weight + 0.01)
            for name, weight in load_file(weights).items()
        }
        weights.unlink()  # an encoder may still have the file mapped into memory
        save_file(changed, weights)

    def indexed(*model: str) -> str:
        done = quickstart(photos, "--model", *model, data=tmp_path / "data")
        opened = open_current(served[-1]["index"])
        opened.require(Encoder.load(opened.checkpoint).fingerprint)
        used = read_config(opened.checkpoint)["backbone"]
        assert (
            used["sha256"]
            == load_backbone(
                BackboneSource(used["model"], used["pretrained"])
            ).content_hash()
        )
        return ("reused: " if "already indexed" in done.output else "made: ") + (
            used["pretrained"] or used["model"]
        )

    first, second = (
        shutil.copytree(tiny_model, tmp_path / version / "clip")
        for version in ("v1", "v2")
    )
    change(second / WEIGHTS_FILE)
    assert indexed(str(first)) == f"made: {first}"
    assert indexed(str(first)) == f"reused: {first}"
    assert indexed(str(second)) == f"made: {second}"
    change(second / WEIGHTS_FILE)
    assert indexed(str(second)) == f"made: {second}"
    config = json.loads((tiny_model / MODEL_CONFIG).read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", config)
    weights = first / WEIGHTS_FILE
    assert indexed("Tiny", "--pretrained", str(weights)) == f"made: {weights}"
    change(weights)
    assert indexed("Tiny", "--pretrained", str(weights)) == f"made: {weights}"


def test_a_missing_folder_and_a_taken_port_are_said_before_a_model_is_loaded(
    photos: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        data = str(tmp_path / "data")
        is_taken = f"cannot listen on port {port} of 127.0.0.1"
        for gallery, fault in {
            "none": "there is no gallery none",
            str(photos): is_taken,
            "": is_taken,
        }.items():
            command = ["quickstart", gallery] if gallery else ["demo"]
            done = CliRunner().invoke(app, [*command, "--port", port, "--data", data])
            assert isinstance(done.exception, DcarError)
            assert str(done.exception).startswith(fault)
            assert "1 of " not in done.output


@needs("time")
def test_a_photo_that_is_added_while_it_serves_is_published(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def serve(index: Path, **flags: Any) -> None:
        (photos / "heron.png").write_bytes(png("navy"))
        end = time.monotonic() + 60
        while current_version(index) == 1 and time.monotonic() < end:
            time.sleep(0.1)
        signal.raise_signal(signal.SIGTERM)  # as the server does after its last request

    monkeypatch.setattr("app.cli.serving.serve_index", serve)
    done = quickstart(photos, "--watch", data=tmp_path / "data")
    assert "New photos are followed" in done.output
    assert done.exit_code == 128 + signal.SIGTERM, "it ended by itself, after the watch"
    (index,) = (
        path.parents[1] for path in (tmp_path / "data").rglob("versions/2.json")
    )
    assert read_manifest(index, 2).change == "1 image added by a watch"
    monkeypatch.setattr("app.cli.serving.serve_index", lambda **flags: None)
    assert "4 images, indexed in" in quickstart(photos, data=tmp_path / "data").output
    assert "is not in it" not in caplog.text, "the watch took what the gallery has"
    remove(index, [open_current(index).item(0).id])
    quickstart(photos, data=tmp_path / "data")
    assert "is not in it" in caplog.text
