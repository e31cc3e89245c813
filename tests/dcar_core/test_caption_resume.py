"""A captioning run that ends early, and what the next one finds."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from caption_harness import ROOT, ask, captions, one_picture
from drawing import draw
from filelock import FileLock
from vision_server import Asked, Behave, Raw, VisionServer, good

from dcar_core.errors import CaptionError, LockedError


def test_what_was_answered_outlives_a_fatal_end(photos: Path) -> None:
    with VisionServer() as server:
        ask(photos, server)
        draw("green", "square").save(photos / "owl" / "0.png")
        server.behave = lambda asked, n: Raw(401)
        with pytest.raises(CaptionError):
            ask(photos, server, concurrency=1)
    assert len(captions(photos)) == 4


def test_a_replaced_picture_is_asked_for_anew(photos: Path) -> None:
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


def test_killed_it_goes_on_and_asks_nothing_twice(photos: Path) -> None:
    out = photos.parent / "captions.json"
    arguments = ["--images", photos, "--out", out, "--model", "small", "--concurrency", "1"]
    hold: Behave = lambda asked, n: Raw(wait=60) if len(server.asked) == 6 else good(asked)  # noqa: E731
    with VisionServer(hold) as server:
        command = [sys.executable, "-m", "app.cli", "data", "caption", "--url", server.url, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
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
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert before == 6
    assert done.returncode == 0, done.stderr
    assert "4 captions" in done.stdout
    answered = [(a.kind, a.picture, a.turn) for a in server.asked]
    del answered[5]  # the one that was under way
    assert len(answered) == len(set(answered)) == 8
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_run_with_other_settings_is_another_run(photos: Path) -> None:
    with VisionServer() as server:
        ask(photos, server)
        with pytest.raises(CaptionError, match=r"of a run with another rounds \(was 3\); give the same again"):
            ask(photos, server, rounds=5)
        assert ask(photos, server, concurrency=4, tries=2).accepted == 4  # how it is asked changes no answer
        assert len(server.asked) == 8
        assert ask(photos, server, rounds=5, restart=True).accepted == 4
        assert len(server.asked) == 16
        (photos.parent / "captions.journal.jsonl").write_text('{"settings": 3}\nnonsense\n')
        with pytest.raises(CaptionError, match="is no journal of captions"):
            ask(photos, server)
        with (
            FileLock(photos.parent / ".captions.json.lock"),
            pytest.raises(LockedError, match="another run is writing"),
        ):
            ask(photos, server)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_run_before_anything_is_asked(photos: Path) -> None:
    (photos.parent / "captions.journal.jsonl").symlink_to("/dev/full")
    with VisionServer() as server:
        with pytest.raises(CaptionError, match="cannot be written: No space left"):
            ask(photos, server)
        assert server.asked == []


def test_annotations_that_cannot_be_written_keep_what_was_answered(photos: Path) -> None:
    in_the_way = photos.parent / "captions.rejected.jsonl"
    in_the_way.mkdir()
    with VisionServer() as server:
        with pytest.raises(CaptionError, match=r"captions\.json cannot be written: Is a directory; what was"):
            ask(photos, server)
        in_the_way.rmdir()
        asked = len(server.asked)
        assert ask(photos, server).accepted == 4
        assert len(server.asked) == asked


def test_a_caption_of_an_earlier_run_is_taken(photos: Path) -> None:
    def behave(asked: Asked, n: int) -> str:
        return "An owl on grass." if asked.kind == "draft" and asked.turn == 0 else good(asked)

    with VisionServer(behave) as server:
        ask(one_picture(photos), server)
        draw("green", "triangle").save(photos / "owl" / "3.png")
        found = ask(photos, server)
    assert (found.accepted, found.rejected) == (2, {"another picture has it too": 1})


def test_a_replaced_picture_may_have_the_caption_that_it_had(photos: Path) -> None:
    def behave(asked: Asked, n: int) -> str:
        return '{"accept": true, "feedback": ""}' if asked.kind == "judge" else "An owl on grass."

    with VisionServer(behave) as server:
        ask(one_picture(photos), server)
        draw("green", "triangle").save(photos / "owl" / "1.png")
        found = ask(photos, server)
    assert (found.accepted, found.rejected) == (1, {})
