"""Captions from an endpoint: a real HTTP server that speaks the protocol, and misbehaves in every way."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from drawing import draw
from filelock import FileLock
from PIL import Image
from vision_server import Asked, Behave, Raw, VisionServer, good, message

from dcar_core.captioning.endpoint import seconds_of
from dcar_core.captioning.options import CaptionOptions, Model, Outcome
from dcar_core.captioning.questions import TEMPLATES, Verdict, load_templates, read_verdict, tidy_draft
from dcar_core.captioning.run import caption
from dcar_core.captioning.summary import summary
from dcar_core.data import load_split
from dcar_core.errors import CaptionError, DataError, LockedError
from dcar_core.tokens import clip_token_counts

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two categories with two pictures each."""
    root = tmp_path / "photos"
    for name in ("red_fox/1.png", "red_fox/2.png", "owl/1.png", "owl/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        draw("red" if "fox" in name else "blue", "circle" if "1" in name else "cross").save(root / name)
    return root


def ask(photos: Path, server: VisionServer, out: Path | None = None, *, judge: bool = True, **given: Any) -> Outcome:
    model = {k: given.pop(k) for k in ("key", "price") if k in given}
    restart = given.pop("restart", False)
    drafter = Model(url=server.url, name="small", **model)
    options = CaptionOptions(
        **{"dataset": "animals", "templates": TEMPLATES, "backoff_s": 0.01, "timeout_s": 20.0, "concurrency": 2} | given
    )
    out = out or photos.parent / "captions.json"
    return caption(
        photos, out, drafter, drafter if judge else None, options, clip_token_counts, restart=restart, progress=False
    )


def captions(photos: Path) -> dict[str, Any]:
    return json.loads((photos.parent / "captions.json").read_text())  # type: ignore[no-any-return]


def rejected(photos: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (photos.parent / "captions.rejected.jsonl").read_text().splitlines()]


def one_picture(photos: Path) -> Path:
    """Leave one, so that what is asked comes in one order."""
    for path in sorted(photos.rglob("*.png"))[1:]:
        path.unlink()
    return photos


def test_a_folder_for_each_category_becomes_a_data_set(photos: Path) -> None:
    (photos / "birds" / "barn_owl").mkdir(parents=True)
    Image.new("RGB", (900, 300), "green").save(photos / "birds" / "barn_owl" / "wide.jpg")
    (photos / "owl" / "cut.png").write_bytes((photos / "owl" / "1.png").read_bytes()[:60])
    draw("red", "square").save(photos / "loose.png")
    (photos / "owl" / "notes.txt").write_text("not a picture")
    with VisionServer() as server:
        found = ask(photos, server, key=KEY, side=256)
    assert found.accepted == 5
    assert found.loose == ["loose.png"]
    assert list(found.broken) == ["owl/cut.png"]
    entries = captions(photos)
    assert set(entries) == {"birds/barn_owl/wide.jpg", *(f"{c}/{i}.png" for c in ("owl", "red_fox") for i in (1, 2))}
    assert entries["birds/barn_owl/wide.jpg"]["meta_category"] == "birds"
    data, _ = load_split(photos.parent / "captions.json", "train", images=photos)
    assert data.samples
    assert {s.category for s in data.samples} <= {"red fox", "owl", "barn owl"}
    assert all(s.caption == f"A {s.category} on grass, number {s.caption[-7:-1]}." for s in data.samples)
    assert server.kinds().count("draft") == server.kinds().count("judge") == 5
    for asked in server.asked:
        assert asked.headers["authorization"] == f"Bearer {KEY}"
        assert "animals" in asked.body["messages"][0]["content"][0]["text"]
        uri = asked.body["messages"][0]["content"][1]["image_url"]["url"]
        picture = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
        assert max(picture.size) <= 256
    assert not any(KEY in file.read_text() for file in photos.parent.glob("captions*"))


BAD: dict[str, Raw | dict[str, Any]] = {
    "429": Raw(429, "slow down"),
    "429 with seconds": Raw(429, headers=(("retry-after", "0.2"),)),
    "429 with a date": Raw(429, headers=(("retry-after", formatdate(time.time() - 5, usegmt=True)),)),
    "500": Raw(500, "oh"),
    "502 as a page": Raw(502, "<html>bad gateway</html>"),
    "503 with nonsense": Raw(503, headers=(("retry-after", "soon"),)),
    "529": Raw(529, "overloaded"),
    "too slow": Raw(body=json.dumps(message("late")), wait=3),
    "drop by drop": Raw(body=json.dumps(message("late")), drip=0.1),
    "a closed connection": Raw(silent=True),
    "half an answer": Raw(body=json.dumps(message("half")), cut=True),
    "truncated JSON": Raw(body=json.dumps(message("half"))[:40]),
    "no JSON": Raw(body="all fine"),
    "not UTF-8": Raw(body="\udcff".encode("utf-8", "surrogateescape").decode("latin-1")),
    "a list": Raw(body="[]"),
    "null": Raw(body="null"),
    "no choices": {"usage": {"prompt_tokens": 1, "completion_tokens": 0}},
    "empty choices": {"choices": []},
    "null choices": {"choices": None},
    "no message": {"choices": [{"finish_reason": "stop"}]},
    "an error in a 200": {"error": {"message": "out of memory"}},
    "too deep": Raw(body="[" * 200_000),
}


@pytest.mark.parametrize("how", list(BAD))
def test_what_goes_wrong_once_is_asked_again(photos: Path, how: str) -> None:
    def behave(asked: Asked, n: int) -> str | Raw | dict[str, Any]:
        return BAD[how] if n == 0 else good(asked)

    with VisionServer(behave) as server:
        found = ask(one_picture(photos), server, timeout_s=1.0 if how in {"too slow", "drop by drop"} else 20.0)
    assert (found.accepted, found.failed) == (1, {})
    assert server.kinds() == ["draft", "draft", "judge", "judge"]


@pytest.mark.parametrize("most", [1, 3])
def test_pictures_are_asked_about_at_the_same_time(photos: Path, most: int) -> None:
    behave: Behave = lambda asked, n: Raw(body=json.dumps(message(good(asked))), wait=1.0)  # noqa: E731
    with VisionServer(behave) as server:
        assert ask(photos, server, judge=False, concurrency=most).accepted == 4
        assert server.at_once == most


def test_retry_after_holds_every_request_back(photos: Path) -> None:
    def behave(asked: Asked, n: int) -> str | Raw:
        first = len(server.asked) == 1
        return Raw(429, headers=(("retry-after", "1"),)) if first else good(asked)

    with VisionServer(behave) as server:
        assert ask(photos, server, judge=False, concurrency=1).accepted == 4
    started = [asked.at for asked in server.asked]
    assert started[1] - started[0] >= 0.99
    assert seconds_of("1.5") == 1.5
    assert seconds_of(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=5)
    assert [seconds_of(x) for x in (None, "soon", "-3")] == [None, None, 0]
    with VisionServer(lambda asked, n: Raw(429, headers=(("retry-after", "4000"),))) as server:
        found = ask(one_picture(photos), server, photos.parent / "other.json")
    assert list(found.failed.values()) == ["asked to wait 4000 s, longer than 300"]
    assert len(server.asked) == 1


REFUSED = {
    "I'm sorry, but I can't assist with that owl.": "a refusal",
    "As an AI, I see an owl.": "a refusal",
    "I\u2019m unable to view the owl.": "a refusal",
    "A barn with a bowl of owlets.": "does not name the category",
    "An owl " + "that is very much like any other owl " * 12: "longer than the context",
    "  ": "empty",
    "...": "empty",
}


@pytest.mark.parametrize("draft", list(REFUSED))
def test_a_useless_draft_is_kept_with_its_reason_and_asked_for_anew(photos: Path, draft: str) -> None:
    with VisionServer(lambda asked, n: draft if asked.kind == "draft" and asked.turn == 0 else good(asked)) as server:
        found = ask(one_picture(photos), server)
    assert found.accepted == 1
    [kept] = rejected(photos)
    assert kept["image"] == "owl/1.png"
    assert kept["reason"] == REFUSED[draft]
    assert kept["draft"] == tidy_draft(draft)
    assert server.kinds() == ["draft", "draft", "judge"]  # no judge is paid for it
    again = server.asked[1]
    assert kept["feedback"] in again.text
    assert [m["role"] for m in again.body["messages"]] == ["user", "assistant", "user"]
    assert all(m["content"] for m in again.body["messages"])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (message("An owl on a", "length"), "cut off by the endpoint's limit"),
        (message(None, "content_filter"), "a refusal"),
        (message(None), "empty"),
        (
            {
                "choices": [
                    {"message": {"content": None, "refusal": "I can't help with that."}, "finish_reason": "stop"}
                ]
            },
            "a refusal",
        ),
    ],
)
def test_what_the_endpoint_says_of_an_answer(photos: Path, answer: dict[str, Any], reason: str) -> None:
    with VisionServer(lambda asked, n: answer if asked.kind == "draft" and asked.turn == 0 else good(asked)) as server:
        found = ask(one_picture(photos), server)
    assert found.accepted == 1
    assert [line["reason"] for line in rejected(photos)] == [reason]


def test_no_two_pictures_have_one_caption(photos: Path) -> None:
    def behave(asked: Asked, n: int) -> str:
        return f"a  {asked.category}." if asked.kind == "draft" and asked.turn == 0 else good(asked)

    with VisionServer(behave) as server:
        found = ask(photos, server)
    assert found.accepted == 4
    assert [line["reason"] for line in rejected(photos)] == ["another picture has it too"] * 2
    texts = [entry["positive"].casefold() for entry in captions(photos).values()]
    assert len(set(texts)) == 4


def test_the_judge_is_heard_and_the_rounds_are_bounded(photos: Path) -> None:
    def behave(asked: Asked, n: int) -> str:
        return '{"accept": false, "feedback": "It is dusk, not noon."}' if asked.kind == "judge" else good(asked)

    with VisionServer(behave) as server:
        found = ask(one_picture(photos), server, rounds=3)
        assert (found.accepted, found.given_up) == (0, ["owl/1.png"])
        assert server.kinds() == ["draft", "judge"] * 3
        assert "It is dusk, not noon." in server.asked[2].text
        assert found.rejected == {"turned down by the judge": 3}
        assert [line["feedback"] for line in rejected(photos)] == ["It is dusk, not noon."] * 3
        assert ask(photos, server, rounds=3).given_up == ["owl/1.png"]
        assert len(server.asked) == 6  # not asked again
    assert captions(photos) == {}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('{"accept": true, "feedback": "good"}', Verdict(True, "good")),
        ('Sure:\n```json\n{"accept": "no",\n "feedback": null}\n``` {', Verdict(False, "")),
        ("<think>accept? {no}</think> Reject: the\ncolour is wrong.", Verdict(False, "the colour is wrong.")),
        ("Yes.", Verdict(True, "")),
        ("**Accepted**", Verdict(True, "**")),
        ("North is up", None),
        ('{"verdict": 1}', None),
        ('{"accept": tr', None),
        ("", None),
    ],
)
def test_verdicts(answer: str, verdict: Verdict | None) -> None:
    assert read_verdict(answer) == verdict


def test_a_judge_that_gives_no_verdict_fails_the_picture_and_keeps_the_draft(photos: Path) -> None:
    behave: Behave = lambda asked, n: "What a lovely owl" if asked.kind == "judge" else good(asked)  # noqa: E731
    with VisionServer(behave) as server:
        found = ask(one_picture(photos), server)
        assert found.failed == {"owl/1.png": "an answer that cannot be used: 'What a lovely owl'"}
        assert server.kinds() == ["draft", *["judge"] * 3]
        assert found.usage["judge"].requests == 3  # paid for, though of no use
        server.behave = good
        found = ask(photos, server)
        assert (found.accepted, found.failed) == (1, {})
        assert server.kinds()[4:] == ["judge"]


def test_drafts_are_tidied() -> None:
    assert tidy_draft('<think>an owl?</think>\n**Caption:** "An owl\n on a  branch."') == "An owl on a branch."
    assert tidy_draft("Here is a caption for the picture: An owl.") == "An owl."
    assert tidy_draft("\u201cAn owl.\u201d") == "An owl."
    assert tidy_draft('An owl and a sign: "open".') == 'An owl and a sign: "open".'


@pytest.mark.parametrize(
    ("status", "says"), [(401, "refuses the key"), (403, "refuses the key"), (404, "no such model")]
)
def test_what_no_request_can_mend_ends_the_run(photos: Path, status: int, says: str) -> None:
    with VisionServer(lambda asked, n: Raw(status, f"wrong: {KEY}")) as server, pytest.raises(CaptionError) as caught:
        ask(photos, server, key=KEY, concurrency=1)
    assert says in str(caught.value)
    assert KEY not in str(caught.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        Raw(400, "x" * 190 + KEY),  # over the place where a long message is cut
        {"error": {"message": f"Incorrect API key: {KEY}"}},  # with status 200
        Raw(body=f"key: {KEY}"),  # no JSON
        f"It is {KEY}",  # what the judge says
    ],
)
def test_no_message_shows_the_key_or_a_part_of_it(photos: Path, answer: Raw | str | dict[str, Any]) -> None:
    def behave(asked: Asked, n: int) -> Raw | str | dict[str, Any]:
        return good(asked) if isinstance(answer, str) and asked.kind == "draft" else answer

    with VisionServer(behave) as server:
        found = ask(photos, server, key=KEY, concurrency=1, tries=2)
    assert len(found.failed) == 4
    assert not any(KEY[:8] in why for why in found.failed.values())


def test_half_of_a_surrogate_pair_is_replaced(photos: Path) -> None:
    """JSON can say it, a file cannot hold it."""
    with VisionServer(lambda asked, n: good(asked) + (" \ud83d" if asked.kind == "draft" else "")) as server:
        found = ask(one_picture(photos), server)
    assert found.accepted == 1


def test_a_refused_request_fails_its_picture_alone(photos: Path) -> None:
    first: list[str] = []

    def behave(asked: Asked, n: int) -> str | Raw:
        first.append(asked.picture)
        return Raw(400, "image too odd") if asked.picture == first[0] else good(asked)

    with VisionServer(behave) as server:
        found = ask(photos, server, concurrency=1)
    assert found.accepted == 3
    assert found.failed == {"owl/1.png": "400 image too odd"}
    assert "1 pictures failed, the same command asks again: owl/1.png (400 image too odd)" in summary(found)


def test_a_run_in_which_all_fails_ends(photos: Path) -> None:
    with VisionServer(lambda asked, n: Raw(400, "no pictures here")) as server:
        with pytest.raises(
            CaptionError, match=r"3 pictures in a row failed; the last, red_fox/1\.png: 400 no pictures"
        ):
            ask(photos, server, concurrency=1, give_up_after=3)
        assert len(server.asked) == 3
    with pytest.raises(CaptionError, match=r"no answer in 2 tries; the last: ConnectError"):
        ask(photos, server, tries=2, give_up_after=2)  # it is gone


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


def test_places_that_cannot_be_used(photos: Path) -> None:
    server = VisionServer()
    (photos.parent / "mine.json").write_text("{}")
    (photos.parent / "empty").mkdir()
    for images, out, says in (
        (photos, "captions.jsonl", "ends in .json"),
        (photos, "mine.json", "is there already and not from this command"),
        (photos.parent / "empty", "new.json", "has no pictures in folders"),
        (photos.parent / "gone", "new.json", "is no directory"),
    ):
        with pytest.raises(DataError, match=says):
            ask(images, server, photos.parent / out)
    for url, says in (
        ("localhost:8000", "is no http"),
        ("http://a:b@host/v1", "password"),
        ("http://h:99999", "no http"),
    ):
        with pytest.raises(DataError, match=says):
            Model(url=url, name="m")
    server._server.server_close()


def test_a_key_goes_to_its_own_host_alone() -> None:
    drafter = Model(url="https://one.example/v1", name="m", key=KEY, price=(1, 2))
    assert drafter.judge(None, "other", None, None).key == KEY
    assert drafter.judge("https://one.example/v2", None, None, None).key == KEY
    for elsewhere in ("https://two.example/v1", "http://one.example/v1", "https://one.example:8443/v1"):
        assert drafter.judge(elsewhere, None, None, None).key is None
        assert drafter.judge(elsewhere, None, "own", None).key == "own"
    assert drafter.judge(None, None, None, None).price == (1, 2)
    assert drafter.judge(None, "other", None, None).price is None
    assert KEY not in repr(drafter)


def test_tokens_and_cost(photos: Path) -> None:
    with VisionServer() as server:
        found = ask(photos, server, price=(1000.0, 5000.0))
        assert (found.usage["draft"].requests, found.usage["draft"].tokens_in, found.usage["judge"].tokens_out) == (
            4,
            400,
            80,
        )
        assert found.cost == pytest.approx(8 * (100 * 1000 + 20 * 5000) / 1e6)
        assert ask(photos, server, price=(1000.0, 5000.0)).cost == found.cost  # what was spent before counts
        assert "cost 1.6000" in summary(found)
        assert ask(photos, server).cost is None
    silent: Behave = lambda asked, n: {k: v for k, v in message(good(asked)).items() if k != "usage"}  # noqa: E731
    with VisionServer(silent) as server:
        found = ask(photos, server, photos.parent / "silent.json", price=(1.0, 1.0))
    assert found.usage["draft"].unknown == 4
    assert "4 draft answers, 0 + 0 tokens, 4 answers did not say how many" in summary(found)
    assert "cost 0.0000 at least" in summary(found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "hold no line"),
        ("What is it?", "needs {category}"),
        ("{category} {name}", "needs {category}"),
        ("{category} {", "needs"),
    ],
)
def test_templates(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(DataError, match=says):
        load_templates(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text("Which {category}?\n\n{dataset}: {category}, {words} words\n")
    assert len(load_templates(tmp_path / "t.txt")) == 2
    with pytest.raises(DataError, match="cannot be read"):
        load_templates(tmp_path / "gone.txt")


def test_the_command(photos: Path) -> None:
    environment = {**os.environ, "DCAR_CAPTION_API_KEY": KEY}
    given = ["--images", photos, "--out", photos.parent / "captions.json", "--model", "small", "--judge-model", "large"]
    with VisionServer() as server:
        command = [sys.executable, "-m", "app.cli", "data", "caption", "--url", server.url, *map(str, given)]
        done = subprocess.run([*command, "--price", "1,2"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "4 captions" in done.stdout
        assert "cost 0.0006" in done.stdout
        assert "4/4" in done.stderr  # the bar
        assert KEY not in done.stdout + done.stderr
        assert {(a.kind, a.body["model"]) for a in server.asked} == {("draft", "small"), ("judge", "large")}
        assert "photos" in server.asked[0].body["messages"][0]["content"][0]["text"]
        done = subprocess.run([*command, "--price", "cheap"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        assert "a price is IN,OUT" in done.stderr
    without = "import sys; sys.modules['httpx'] = None; sys.argv[0] = 'dcar'; from app.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", without, *command[3:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "dcar: captioning needs an optional dependency: pip install 'dcar[caption]'"
