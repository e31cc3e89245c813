"""A captioning run that ends early, and what the next one finds."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock

from dcar_core.util.errors import CaptionError, LockedError
from tests.support.captioning import ask, captions, one_image
from tests.support.commands import Command, dcar
from tests.support.images import draw
from tests.support.vision_server import Asked, Behave, Raw, VisionServer, good


def test_replaced_image_is_captioned_anew(photos: Path) -> None:
    with VisionServer() as server:
        ask(photos, server)
        before = captions(photos)
        draw("green", "triangle").save(photos / "owl" / "1.png")
        assert ask(photos, server).accepted == 4
        assert server.kinds()[8:] == ["draft", "judge"]
    changed = {name for name, entry in captions(photos).items() if entry != before[name]}
    assert changed == {"owl/1.png"}
    (photos / "owl" / "1.png").write_bytes(b"")
    with VisionServer() as server:
        assert list(ask(photos, server).broken) == ["owl/1.png"]
        assert server.asked == []
    assert "owl/1.png" not in captions(photos)


@pytest.mark.slow
def test_killed_run_resumes_without_repeated_requests(photos: Path) -> None:
    out = photos.parent / "captions.json"
    arguments = ["--images", photos, "--out", out, "--model", "small", "--concurrency", "1"]
    hold: Behave = lambda asked, n: Raw(wait=60) if len(server.asked) == 6 else good(asked)  # noqa: E731
    with VisionServer(hold) as server:
        command = ["data", "caption", "--url", server.url, *map(str, arguments)]
        process = Command("app.cli", *command, stdout=os.devnull, stderr=os.devnull)
        until = time.monotonic() + 120
        while len(server.asked) < 6 and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        journal = photos.parent / "captions.journal.jsonl"
        with journal.open("ab") as file:
            file.write(b'{"image": "owl/2.png", "finis')  # cut off in the middle of a line
        before = len(server.asked)
        server.behave = good
        done = dcar(*command)
    assert before == 6
    assert done.returncode == 0, done.stderr
    assert "4 captions" in done.stdout
    answered = [(a.kind, a.image, a.turn) for a in server.asked]
    del answered[5]  # the one that was under way
    assert len(answered) == len(set(answered)) == 8
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_run_with_other_settings_is_another_run(photos: Path) -> None:
    with VisionServer() as server:
        ask(photos, server)
        with pytest.raises(CaptionError, match=r"made with other settings: rounds \(was 3\); use those"):
            ask(photos, server, rounds=5)
        assert ask(photos, server, concurrency=4, tries=2).accepted == 4  # the way of asking changes no response
        assert len(server.asked) == 8
        assert ask(photos, server, rounds=5, restart=True).accepted == 4
        assert len(server.asked) == 16
        with (
            FileLock(photos.parent / ".captions.json.lock"),
            pytest.raises(LockedError, match="another run is writing"),
        ):
            ask(photos, server)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_ends_the_run_before_any_request(photos: Path) -> None:
    (photos.parent / "captions.journal.jsonl").symlink_to("/dev/full")
    with VisionServer() as server:
        with pytest.raises(CaptionError, match="cannot be written: No space left"):
            ask(photos, server)
        assert server.asked == []


@pytest.mark.parametrize(
    "content",
    ["[1]", '{"settings": null}', '{"settings": 3}\nx', '{"settings": {}}\n[1]', '{"settings": {}}\n{"asked": 1}'],
)
def test_another_file_is_no_journal(content: str, photos: Path) -> None:
    (photos.parent / "captions.journal.jsonl").write_text(content + "\n")
    with VisionServer() as server, pytest.raises(CaptionError, match="is not a captioning journal"):
        ask(photos, server)


def test_responses_are_kept_if_annotations_cannot_be_written(photos: Path) -> None:
    in_the_way = photos.parent / "captions.rejected.jsonl"
    in_the_way.mkdir()
    with VisionServer() as server:
        with pytest.raises(CaptionError, match=r"captions\.json cannot be written: Is a directory; responses are kept"):
            ask(photos, server)
        in_the_way.rmdir()
        asked = len(server.asked)
        assert ask(photos, server).accepted == 4
        assert len(server.asked) == asked


def no_fantasy(asked: Asked, _: int = 0) -> str:
    """Return one caption for all images of a category, unless another is asked for."""
    return f"Any {asked.category} on grass." if asked.kind == "draft" and asked.turn == 0 else good(asked)


@pytest.mark.parametrize("to", ["owl/0.png", "birds/owl/1.png"])
def test_moved_image_keeps_its_caption(photos: Path, to: str) -> None:
    with VisionServer(no_fantasy) as server:
        ask(one_image(photos), server)
        (photos / to).parent.mkdir(parents=True, exist_ok=True)
        (photos / "owl" / "1.png").rename(photos / to)
        for _ in range(2):
            found = ask(photos, server)
            assert (found.accepted, found.rejected, len(server.asked)) == (1, {}, 2)
            assert {name: entry["positive"] for name, entry in captions(photos).items()} == {to: "Any owl on grass."}


def test_copies_and_images_of_another_category_are_captioned(photos: Path) -> None:
    with VisionServer(no_fantasy) as server:
        ask(one_image(photos), server)
        shutil.copy(photos / "owl" / "1.png", photos / "owl" / "0.png")
        shutil.copy(photos / "owl" / "1.png", photos / "red_fox" / "1.png")
        found = ask(photos, server)
    assert (found.accepted, found.rejected) == (3, {"another image has the same caption": 1})
    said = {name: entry["positive"] for name, entry in captions(photos).items()}
    assert said.pop("owl/0.png").startswith("A owl on grass, number ")
    assert said == {"owl/1.png": "Any owl on grass.", "red_fox/1.png": "Any red fox on grass."}


def test_captions_of_deleted_images_can_be_given_again(photos: Path) -> None:
    with VisionServer(no_fantasy) as server:
        ask(one_image(photos), server)
        (photos / "owl" / "1.png").unlink()
        draw("green", "triangle").save(photos / "owl" / "0.png")
        found = ask(photos, server)
        assert (found.accepted, found.rejected) == (1, {})
        (photos / "owl" / "0.png").write_bytes(b"broken by now")
        draw("blue", "triangle").save(photos / "owl" / "3.png")
        found = ask(photos, server)
    assert (found.accepted, list(found.broken), found.rejected) == (1, ["owl/0.png"], {})


def test_restored_image_keeps_its_caption(photos: Path) -> None:
    """The image's bytes decide between captions of one name, not their order."""
    first = (one_image(photos) / "owl" / "1.png").read_bytes()
    with VisionServer(no_fantasy) as server:
        ask(photos, server)
        draw("green", "triangle").save(photos / "owl" / "1.png")
        server.behave = good
        ask(photos, server)
        server.behave = no_fantasy
        (photos / "owl" / "1.png").write_bytes(first)
        draw("green", "cross").save(photos / "owl" / "0.png")
        found = ask(photos, server, concurrency=1)
    assert (found.accepted, found.rejected) == (2, {"another image has the same caption": 1})
    assert captions(photos)["owl/1.png"]["positive"] == "Any owl on grass."
