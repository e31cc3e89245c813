"""Captions of the user's images from a real HTTP server that speaks the protocol."""

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dcar_core.captioning.options import VisionModel
from dcar_core.captioning.questions import load_templates
from dcar_core.data import load_split
from dcar_core.util.errors import DataError
from tests.support.captioning import KEY, ask, captions
from tests.support.commands import dcar
from tests.support.images import draw
from tests.support.paths import ROOT
from tests.support.vision_server import Behave, VisionServer, good, message


def test_a_folder_for_each_category_becomes_a_data_set(photos: Path) -> None:
    (photos / "birds" / "barn_owl").mkdir(parents=True)
    Image.new("RGB", (900, 300), "green").save(photos / "birds" / "barn_owl" / "wide.jpg")
    (photos / "owl" / "cut.png").write_bytes((photos / "owl" / "1.png").read_bytes()[:60])
    draw("red", "square").save(photos / "loose.png")
    (photos / "owl" / "notes.txt").write_text("not a picture")
    with VisionServer() as server:
        found = ask(photos, server, key=f" {KEY}\r\n", side=256)
    assert found.accepted == 5
    assert found.loose == ["loose.png"]
    assert list(found.broken) == ["owl/cut.png"]
    entries = captions(photos)
    assert set(entries) == {"birds/barn_owl/wide.jpg", *(f"{c}/{i}.png" for c in ("owl", "red_fox") for i in (1, 2))}
    assert entries["birds/barn_owl/wide.jpg"]["meta_category"] == "birds"
    data, _ = load_split(photos.parent / "captions.json", "train", image_root=photos)
    assert data.samples
    assert {s.category for s in data.samples} <= {"red fox", "owl", "barn owl"}
    assert all(s.caption == f"A {s.category} on grass, number {s.caption[-7:-1]}." for s in data.samples)
    assert server.kinds().count("draft") == server.kinds().count("judge") == 5
    for asked in server.asked:
        assert asked.headers["authorization"] == f"Bearer {KEY}"
        assert "animals" in asked.body["messages"][0]["content"][0]["text"]
        uri = asked.body["messages"][0]["content"][1]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
        assert max(image.size) <= 256
    assert not any(KEY in file.read_text() for file in photos.parent.glob("captions*"))


def test_a_folder_of_underscores_names_no_category(photos: Path) -> None:
    draw("red", "square").save(photos / "loose.png")
    for folder in ("_", "owl/-_-"):
        (photos / folder).mkdir()
        draw("red", "square").save(photos / folder / "1.png")
    with VisionServer() as server:
        found = ask(photos, server)
    assert (found.accepted, found.given_up, len(server.asked)) == (4, [], 8)
    assert found.loose == ["_/1.png", "loose.png", "owl/-_-/1.png"]


def test_file_name_that_is_not_utf_8_fails_its_own_image(photos: Path) -> None:
    odd = os.fsdecode(b"owl/\xff.png")
    try:
        draw("red", "square").save(photos / odd)
    except OSError:
        pytest.skip("this file system takes no such name")
    with VisionServer() as server:
        for _ in range(2):
            found = ask(photos, server)
            assert (found.accepted, found.failed, len(server.asked)) == (4, {}, 8)
            assert found.broken == {odd: "its name is not UTF-8; rename the file"}
    assert "1 images unreadable, left out: owl/" in str(found)


def test_unusable_directories_are_refused(photos: Path) -> None:
    server = VisionServer()
    (photos.parent / "mine.json").write_text("{}")
    (photos.parent / "empty").mkdir()
    for images, out, says in (
        (photos, "captions.jsonl", "ends in .json"),
        (photos, "mine.json", "exists and was not written by this command"),
        (photos.parent / "empty", "new.json", "has no images in folders"),
        (photos.parent / "gone", "new.json", "is not a directory"),
    ):
        with pytest.raises(DataError, match=says):
            ask(images, server, photos.parent / out)
    for url, says in (
        ("localhost:8000", "is not an http"),
        ("http://a:b@host/v1", "password"),
        ("http://h:99999", "is not an http"),
    ):
        with pytest.raises(DataError, match=says):
            VisionModel(url=url, name="m")
    server._server.server_close()


def test_tokens_and_cost_are_estimated(photos: Path) -> None:
    with VisionServer() as server:
        found = ask(photos, server, price=(1000.0, 5000.0))
        usage = found.usage
        assert (usage["draft"]["requests"], usage["draft"]["tokens_in"], usage["judge"]["tokens_out"]) == (4, 400, 80)
        assert found.cost == pytest.approx(8 * (100 * 1000 + 20 * 5000) / 1e6)
        assert ask(photos, server, price=(1000.0, 5000.0)).cost == found.cost  # earlier spending counts
        assert "cost 1.6000" in str(found)
        assert ask(photos, server).cost is None
    silent: Behave = lambda asked, n: {k: v for k, v in message(good(asked)).items() if k != "usage"}  # noqa: E731
    with VisionServer(silent) as server:
        found = ask(photos, server, photos.parent / "silent.json", price=(1.0, 1.0))
    assert found.usage["draft"]["unknown"] == 4
    assert "4 draft responses, 0 + 0 tokens, 4 responses without token counts" in str(found)
    assert "cost 0.0000 at least" in str(found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("What is it?", "needs {category}"),
        ("{category} {name}", "needs {category}"),
        ("{category} {", "needs"),
    ],
)
def test_template_files_are_checked(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(DataError, match=says):
        load_templates(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text("Which {category}?\n\n{dataset}: {category}, {words} words\n")
    assert len(load_templates(tmp_path / "t.txt")) == 2
    with pytest.raises(DataError, match="cannot be read"):
        load_templates(tmp_path / "gone.txt")


@pytest.mark.slow
def test_command_writes_annotations_and_a_summary(photos: Path) -> None:
    environment = {"DCAR_CAPTION_API_KEY": KEY}
    given = ["--images", photos, "--out", photos.parent / "captions.json", "--model", "small", "--judge-model", "large"]
    with VisionServer() as server:
        command = ["data", "caption", "--url", server.url, *map(str, given)]
        done = dcar(*command, "--price", "1,2", environment=environment)
        assert done.returncode == 0, done.stderr
        assert "4 captions" in done.stdout
        assert "cost 0.0006" in done.stdout
        assert "4/4" in done.stderr  # the bar
        assert KEY not in done.stdout + done.stderr
        assert {(a.kind, a.body["model"]) for a in server.asked} == {("draft", "small"), ("judge", "large")}
        assert "photos" in server.asked[0].body["messages"][0]["content"][0]["text"]
        done = dcar(*command, "--price", "cheap", environment=environment)
        assert done.returncode == 2
        assert "a price is IN,OUT" in done.stderr
    without = "import sys; sys.modules['openai'] = None; sys.argv[0] = 'dcar'; from app.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", without, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: captioning needs an optional dependency: pip install 'dcar[caption]'"
