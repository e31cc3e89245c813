"""Captions from a real HTTP server that speaks the protocol: drafts and their judge,
faults, resumed runs.
"""

import base64
import io
import json
import os
import shutil
import signal
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from PIL import Image
from vision_server import Asked, Behave, Raw, VisionServer, good, message

from dcar_caption import run
from dcar_caption.endpoint import CaptionError, Completion, open_endpoints
from dcar_caption.options import CaptionOptions
from dcar_caption.questions import (
    TEMPLATES,
    load_templates,
    question,
    read_verdict,
    tidy_draft,
)
from dcar_core.data import Annotations
from dcar_core.util.errors import DataError, LockedError
from tests.support.commands import Command, dcar
from tests.support.images import draw

KEY = "sk-very-secret"


def ask(photos: Path, server: VisionServer, **given: Any) -> run.CaptioningRun:
    usual: dict[str, Any] = {
        "dataset": "animals",
        "tries": 2,
        "timeout": 20.0,
        "concurrency": 2,
    }
    usual |= {
        "images": photos,
        "out": photos.parent / "captions.json",
        "url": server.url,
        "model": "small",
    }
    return run.caption_images(CaptionOptions(**usual | given))


def captions(photos: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads((photos.parent / "captions.json").read_text())
    return entries


def rejected(photos: Path) -> list[list[str]]:
    """Return draft, reason and feedback of each rejection in the journal."""
    with closing(sqlite3.connect(photos.parent / "captions.journal.sqlite")) as journal:
        rows = journal.execute(
            "SELECT value FROM journal WHERE kind = 'rejection' ORDER BY image, turn"
        )
        return [json.loads(value) for (value,) in rows]


def one_image(photos: Path) -> Path:
    """Delete all images but one, so requests have one order."""
    for path in sorted(photos.rglob("*.png"))[1:]:
        path.unlink()
    return photos


def test_a_folder_for_each_category_becomes_a_data_set(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "birds" / "barn_owl").mkdir(parents=True)
    Image.new("RGB", (900, 300), "green").save(
        photos / "birds" / "barn_owl" / "wide.jpg"
    )
    (photos / "owl" / "cut.png").write_bytes(
        (photos / "owl" / "1.png").read_bytes()[:60]
    )
    draw("red", "square").save(photos / "loose.png")
    (photos / "more").symlink_to(photos / "birds")
    (photos / "owl" / "notes.txt").write_text("not a picture")
    monkeypatch.setenv("DCAR_CAPTION_API_KEY", f" {KEY}\r\n")
    with VisionServer() as server:
        found = ask(photos, server, side=256)
    assert found.accepted == 5
    assert found.left_out.keys() == {"loose.png", "more", "owl/cut.png"}
    assert (
        "3 without a caption: loose.png (outside of category folders), more (a link to"
        " a folder), " in found.summary()
    )
    entries = captions(photos)
    assert set(entries) == {
        "birds/barn_owl/wide.jpg",
        *(f"{c}/{i}.png" for c in ("owl", "red_fox") for i in (1, 2)),
    }
    assert entries["birds/barn_owl/wide.jpg"]["meta_category"] == "birds"
    data, _ = Annotations(photos.parent / "captions.json", photos).load("train")
    assert data.samples
    assert {s.category for s in data.samples} <= {"red fox", "owl", "barn owl"}
    assert all(
        s.caption == f"A {s.category} on grass, number {s.caption[-7:-1]}."
        for s in data.samples
    )
    assert server.kinds().count("draft") == server.kinds().count("judge") == 5
    for asked in server.asked:
        assert asked.headers["authorization"] == f"Bearer {KEY}"
        assert "animals" in asked.body["messages"][0]["content"][0]["text"]
        uri = asked.body["messages"][0]["content"][1]["image_url"]["url"]
        image = Image.open(
            io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))
        )
        assert max(image.size) <= 256
    assert not any(
        KEY.encode() in file.read_bytes() for file in photos.parent.glob("captions*")
    )


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
            assert "surrogates not allowed" in found.left_out[odd]


def test_unusable_directories_are_refused(photos: Path) -> None:
    (photos.parent / "mine.json").write_text("{}")
    (photos.parent / "empty").mkdir()
    with VisionServer() as server:
        for images, out, says in (
            (photos, "captions.jsonl", "ends in .json"),
            (photos, "mine.json", "exists and was not written by this command"),
            (photos.parent / "empty", "new.json", "has no images in folders"),
            (photos.parent / "gone", "new.json", "has no images in folders"),
        ):
            with pytest.raises(DataError, match=says):
                ask(images, server, out=photos.parent / out)
        with pytest.raises(DataError, match="password"):
            ask(photos, server, url="http://a:b@host/v1")
        assert (
            "Connection error."
            in ask(photos, server, url="localhost:8000", tries=1).failed["owl/1.png"]
        )


def test_tokens_are_counted(photos: Path) -> None:
    with VisionServer() as server:
        for _ in range(2):  # earlier spending counts
            assert ask(photos, server).usage == {
                "requests": 8,
                "tokens_in": 800,
                "tokens_out": 160,
            }
        assert "8 responses, 800 + 160 tokens" in ask(photos, server).summary()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no question"),
        ("What is it?", "without {category}"),
        ("{category} {name}", "name"),
        ("{category} {", "Single '{'"),
    ],
)
def test_template_files_are_checked(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(DataError, match=says):
        load_templates(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text(
        "Which {category}?\n\n{dataset}: {category}, {words} words\n"
    )
    assert len(load_templates(tmp_path / "t.txt")) == 2
    with pytest.raises(DataError, match="No such file"):
        load_templates(tmp_path / "gone.txt")


@pytest.mark.slow
def test_command_writes_annotations_and_a_summary(photos: Path) -> None:
    environment = {"DCAR_CAPTION_API_KEY": KEY}
    given = [
        "--images",
        photos,
        "--out",
        photos.parent / "captions.json",
        "--model",
        "small",
        "--judge-model",
        "large",
    ]
    with VisionServer() as server:
        command = ["data", "caption", "--url", server.url, *map(str, given)]
        done = dcar(*command, environment=environment)
        assert done.returncode == 0, done.stderr
        assert "4 captions" in done.stdout
        assert "4/4" in done.stderr  # the bar
        assert KEY not in done.stdout + done.stderr
        assert {(a.kind, a.body["model"]) for a in server.asked} == {
            ("draft", "small"),
            ("judge", "large"),
        }
        assert "photos" in server.asked[0].body["messages"][0]["content"][0]["text"]
    with VisionServer(lambda *_: "I'm sorry, I can't help.") as server:
        command[3] = server.url
        command[command.index("--out") + 1] = str(photos.parent / "none.json")
        done = dcar(*command, environment=environment)
        assert (done.returncode, "none.json: 0 captions" in done.stdout) == (1, True)


REFUSED = {
    "I'm sorry, but I can't assist with that owl.": "a refusal",
    "As an AI, I see an owl.": "a refusal",
    "I\u2019m unable to view the owl.": "a refusal",
    "A barn with a bowl of owlets.": "does not name the category",
    "An owl " + "that is very much like any other owl " * 12: "longer than the context",
    "  ": "empty",
    "...": "empty",
    "<think>An owl on grass.": "empty",
}


@pytest.mark.parametrize("draft", list(REFUSED))
def test_rejected_draft_is_kept_with_its_reason_and_repeated(
    photos: Path, draft: str
) -> None:
    with VisionServer(
        lambda asked, n: (
            draft if asked.kind == "draft" and asked.turn == 0 else good(asked)
        )
    ) as server:
        found = ask(one_image(photos), server)
    assert found.accepted == 1
    [[kept, reason, feedback]] = rejected(photos)
    assert (kept, reason) == (tidy_draft(draft), REFUSED[draft])
    assert server.kinds() == ["draft", "draft", "judge"]  # no judge is paid for it
    again = server.asked[1]
    assert feedback in again.text
    assert [m["role"] for m in again.body["messages"]] == ["user", "assistant", "user"]
    assert all(m["content"] for m in again.body["messages"])


def test_no_two_images_share_a_caption(photos: Path) -> None:
    def behave(asked: Asked, n: int) -> str:
        if asked.kind == "draft" and asked.turn == 0:
            return f"a  {asked.category}."
        return good(asked)

    with VisionServer(behave) as server:
        found = ask(photos, server)
    assert found.accepted == 4
    assert found.rejected == {"another image has the same caption": 2}
    texts = [entry["positive"].casefold() for entry in captions(photos).values()]
    assert len(set(texts)) == 4


def test_judge_decides_within_a_limited_number_of_rounds(photos: Path) -> None:
    def behave(asked: Asked, n: int) -> str:
        if asked.kind == "judge":
            return '{"accept": false, "feedback": "It is dusk, not noon."}'
        return good(asked)

    with VisionServer(behave) as server:
        found = ask(one_image(photos), server, rounds=3)
        assert (found.accepted, found.left_out) == (
            0,
            {"owl/1.png": "every draft was rejected"},
        )
        assert server.kinds() == ["draft", "judge"] * 3
        assert "It is dusk, not noon." in server.asked[2].text
        assert found.rejected == {"rejected by the judge": 3}
        assert [feedback for *_, feedback in rejected(photos)] == [
            "It is dusk, not noon."
        ] * 3
        assert list(ask(photos, server, rounds=3).left_out) == ["owl/1.png"]
        assert len(server.asked) == 6  # not asked again
    assert captions(photos) == {}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('{"accept": true, "feedback": "good"}', (True, "good")),
        ('Sure:\n```json\n{"accept": "no",\n "feedback": null}\n``` {', (False, "")),
        (
            "<think>accept? {no}</think> Reject: the\ncolour is wrong.",
            (False, "the colour is wrong."),
        ),
        (
            'Hm, {"accept": true}?\n</think>\n{"accept": false, "feedback": "no"}',
            (False, "no"),
        ),
        ("Yes, it fits.</Think> No, it does not.", (False, "it does not.")),
        ('<think>{"accept": true}', None),
        ('{"accept": false, "feedback": "no \\ud83d good"}', (False, "no \ufffd good")),
        ('{"accept":' * 100_000, None),
        ("Yes.", (True, "")),
        ("**Accepted**", (True, "**")),
        ("North is up", None),
        ('{"verdict": 1}', None),
        ('{"accept": tr', None),
        ("", None),
    ],
)
def test_verdicts_are_parsed(answer: str, verdict: tuple[bool, str] | None) -> None:
    assert read_verdict(Completion(answer, "stop")) == verdict


def test_missing_verdict_fails_the_image_and_keeps_the_draft(photos: Path) -> None:
    behave: Behave = lambda asked, n: (  # noqa: E731
        "What a lovely owl" if asked.kind == "judge" else good(asked)
    )
    with VisionServer(behave) as server:
        found = ask(one_image(photos), server)
        assert found.failed == {"owl/1.png": "the judge gave no verdict"}
        server.behave = good
        found = ask(photos, server)
        assert (found.accepted, found.failed) == (1, {})
        assert server.kinds() == ["draft", "judge", "judge"]
        assert found.usage["requests"] == 3  # paid for, though one was of no use


LEADS = (
    "Sure: ",
    "Sure! Here is the caption: ",
    "Of course! Here\u2019s the caption:\n\n",
    "Certainly. The caption: ",
    "Image caption: ",
    "**The image caption:** ",
    "Here is a caption for the picture: ",
)
KEPT = (
    '"Barn owl" beside a sign that says "Farm"',
    "\u201cBarn owl\u201d beside a sign that says \u201cFarm\u201d",
    "'Barn owl' beside a sign that says 'Farm'",
    '"Barn owl" on the farm of the Smiths\'',
    "Of course a beagle has ears: long ones.",
    ":) on a sign",
    'An owl and a sign: "open".',
)


@pytest.mark.parametrize(
    ("answer", "draft"),
    [
        (
            '<think>an owl?</think>\n**Caption:** "An owl\n on a  branch."',
            "An owl on a branch.",
        ),
        ("An owl? Or two?\n</think>\n\nAn owl.", "An owl."),
        ("<think>an owl?</think> Two. <think>no</think>An owl.", "An owl."),
        ("<think>An owl?", ""),
        ("\u201cAn owl.\u201d", "An owl."),
        ("'A barn owl's nest'", "A barn owl's nest"),
        ('""', ""),
        *((f"{lead}A beagle on grass.", "A beagle on grass.") for lead in LEADS),
        *((draft, draft) for draft in KEPT),
    ],
)
def test_drafts_are_cleaned(answer: str, draft: str) -> None:
    assert tidy_draft(answer) == draft


def test_each_image_keeps_its_own_question() -> None:
    def asked(image: str) -> str:
        return question(TEMPLATES, image, category="owl", dataset="animals", words=40)

    names = [f"owl/{number}.png" for number in range(30)]
    assert len({asked(name) for name in names}) == len(TEMPLATES)
    assert [asked(name) for name in names] == [asked(name) for name in names]


TRANSIENT = {
    "429": Raw(429, "slow down"),
    "503": Raw(503, headers=(("retry-after", "0.2"),)),
    "too slow": Raw(body=json.dumps(message("late")), wait=1.5),
    "a closed connection": Raw(silent=True),
    "half an answer": Raw(body=json.dumps(message("half")), cut=True),
    "gzip that is none": Raw(
        body=b"\x1f\x8bhalf", headers=(("content-encoding", "gzip"),)
    ),
}
REFUSAL = {
    "choices": [{"message": {"content": None, "refusal": "No owl may be described."}}]
}
UNUSABLE: dict[str, Raw | dict[str, Any]] = {
    "truncated JSON": Raw(body=json.dumps(message("half"))[:40]),
    "no JSON": Raw(body="all fine"),
    "not UTF-8": Raw(
        body="\udcff".encode("utf-8", "surrogateescape").decode("latin-1")
    ),
    "a list": Raw(body="[]"),
    "null": Raw(body="null"),
    "no choices": {"usage": {"prompt_tokens": 1, "completion_tokens": 0}},
    "empty choices": {"choices": []},
    "null choices": {"choices": None},
    "no message": {"choices": [{"finish_reason": "stop"}]},
    "an error in a 200": {"error": {"message": "out of memory"}},
    "too deep": Raw(body="[" * 200_000),
}


@pytest.mark.parametrize("how", TRANSIENT)
@pytest.mark.slow
def test_transient_errors_are_retried(photos: Path, how: str) -> None:
    with VisionServer(
        lambda asked, n: TRANSIENT[how] if n == 0 else good(asked)
    ) as server:
        found = ask(
            one_image(photos),
            server,
            tries=4,
            timeout=0.5 if how == "too slow" else 20.0,
        )
    assert (found.accepted, found.failed) == (1, {})
    assert server.kinds() == ["draft", "draft", "judge", "judge"]


@pytest.mark.parametrize("how", UNUSABLE)
def test_unusable_response_fails_its_own_image(photos: Path, how: str) -> None:
    with VisionServer(
        lambda asked, n: UNUSABLE[how] if n == 0 else good(asked)
    ) as server:
        assert (
            ask(one_image(photos), server, judge=False)
            .failed["owl/1.png"]
            .startswith("no completion: ")
        )
        found = ask(photos, server, judge=False)
    assert (found.accepted, found.usage["requests"]) == (1, 2)


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.slow
def test_images_are_captioned_concurrently(photos: Path, most: int) -> None:
    def behave(asked: Asked, n: int) -> Raw:
        full = time.monotonic() + 5
        while server.at_once < most and time.monotonic() < full:
            time.sleep(0.005)
        # a request too many would arrive meanwhile
        return Raw(body=json.dumps(message(good(asked))), wait=0.1)

    with VisionServer(behave) as server:
        assert ask(photos, server, judge=False, concurrency=most).accepted == 4
        assert server.at_once == most


@pytest.mark.slow
def test_an_image_fails_after_its_last_attempt(photos: Path) -> None:
    with VisionServer(lambda asked, n: Raw(429, "slow down")) as server:
        found = ask(photos, server, tries=1, judge=False)
        assert (found.failed["owl/1.png"], len(server.asked)) == ("429 slow down", 4)
        server.behave = lambda asked, n: Raw(silent=True)
        found = ask(photos, server, tries=1, judge=False)
        assert found.failed["owl/2.png"].startswith("Connection error.")
        server.behave = lambda asked, n: Raw(body=json.dumps(message("late")), drip=0.1)
        found = ask(photos, server, tries=1, judge=False, timeout=0.3)
    assert found.failed["owl/2.png"] == "too slow"


@pytest.mark.parametrize(
    "usage", [[1], "many", {"prompt_tokens": None, "completion_tokens": "3"}]
)
def test_usage_of_another_form_is_not_counted(photos: Path, usage: Any) -> None:
    with VisionServer(
        lambda asked, n: message("An owl on grass.", usage=usage)
    ) as server:
        found = ask(one_image(photos), server, judge=False)
    assert (found.accepted, found.usage["requests"], found.usage["tokens_in"]) == (
        1,
        1,
        0,
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (message("An owl on a", "length"), "cut off by the endpoint's limit"),
        (message("<think>The owl is", "length"), "cut off by the endpoint's limit"),
        (message(None, "content_filter"), "a refusal"),
        (message(None), "empty"),
        (REFUSAL, "a refusal"),
    ],
)
def test_rejected_drafts_name_the_finish_reason(
    photos: Path,
    answer: dict[str, Any],
    reason: str,
) -> None:
    with VisionServer(
        lambda asked, n: (
            answer if asked.kind == "draft" and asked.turn == 0 else good(asked)
        )
    ) as server:
        found = ask(one_image(photos), server)
        assert found.accepted == 1
        assert found.rejected == {reason: 1}
        server.behave = lambda asked, n: (
            good(asked) if asked.kind == "draft" else REFUSAL
        )
        found = ask(photos, server, out=photos.parent / "other.json")
    assert list(found.failed.values()) == ["the judge gave no verdict"]


@pytest.mark.parametrize(
    "answer",
    [
        Raw(400, "x" * 190 + KEY),  # over the place where a long message is cut
        {"error": {"message": f"Incorrect API key: {KEY}"}},  # with status 200
        Raw(body=f"key: {KEY}"),  # no JSON
    ],
)
def test_messages_never_show_the_key(
    photos: Path,
    answer: Raw | dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DCAR_CAPTION_API_KEY", KEY)
    with VisionServer(lambda asked, n: answer) as server:
        found = ask(photos, server)
    assert len(found.failed) == 4
    assert not any(KEY[:8] in why for why in found.failed.values())


@pytest.mark.parametrize("odd", ["\n", "\x01", "\u00e9", "\udcff"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(
    odd: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DCAR_CAPTION_API_KEY", f"{KEY}{odd}x")
    with (
        VisionServer() as server,
        pytest.raises(DataError, match="not printable ASCII") as caught,
    ):
        ask(photos, server)
    assert KEY not in str(caught.value)


def test_half_of_a_surrogate_pair_is_replaced(photos: Path) -> None:
    """JSON can say it, a file cannot hold it."""
    with VisionServer(
        lambda asked, n: good(asked) + (" \ud83d" if asked.kind == "draft" else "")
    ) as server:
        found = ask(one_image(photos), server)
    assert found.accepted == 1


def test_refused_request_fails_its_own_image(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behave(asked: Asked, n: int) -> str | Raw:
        second = len({each.image for each in server.asked}) % 2 == 0
        return Raw(400, "image too odd") if second else good(asked)

    monkeypatch.setattr(run, "MAX_FAILED", 2)  # scattered failures do not end the run
    with VisionServer(behave) as server:
        found = ask(photos, server, concurrency=1)
    assert found.accepted == 2
    assert found.failed == dict.fromkeys(
        ["owl/2.png", "red_fox/2.png"], "400 image too odd"
    )
    assert (
        "2 failed, for the next run: owl/2.png (400 image too odd), " in found.summary()
    )


def test_consecutive_failures_end_the_run(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "MAX_FAILED", 3)
    with VisionServer(lambda asked, n: Raw(401, "wrong key")) as server:
        with pytest.raises(
            CaptionError,
            match=(
                r"3 consecutive images failed; red_fox/1\.png: 401 wrong key; check the"
            ),
        ):
            ask(photos, server, concurrency=1)
        assert len(server.asked) == 3
    # it is gone
    with pytest.raises(
        CaptionError, match=r"red_fox/1\.png: Connection error\. .*; check the URL"
    ):
        ask(photos, server, concurrency=1, tries=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks4://127.0.0.1:9"), ("SSL_CERT_FILE", "/none.pem")],
)
def test_proxies_and_certificates_that_cannot_be_used_end_the_run(
    name: str,
    value: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("SSL_CERT_DIR")
    monkeypatch.setenv("NO_PROXY", "")
    with (
        VisionServer() as server,
        pytest.raises(CaptionError, match=r"/v1 cannot be requested \("),
    ):
        ask(photos, server)
    assert server.asked == []


def test_key_is_sent_to_its_own_host_only(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCAR_CAPTION_API_KEY", KEY)

    def keys(own: str, **given: Any) -> dict[str, str]:
        monkeypatch.setenv("DCAR_JUDGE_API_KEY", own)
        options = CaptionOptions(
            images=photos,
            out=photos,
            url="https://one.example/v1",
            model="m",
            **given,
        )
        return {
            role: endpoint.client.api_key
            for role, endpoint in open_endpoints(options, Counter()).items()
        }

    assert (
        keys("")
        == keys("", judge_url="https://one.example/v2")
        == {
            "draft": KEY,
            "judge": KEY,
        }
    )
    for elsewhere in (
        "https://two.example/v1",
        "http://one.example/v1",
        "https://one.example:8443/v1",
    ):
        assert keys("", judge_url=elsewhere)["judge"] == "none"
        assert keys("own", judge_url=elsewhere) == {"draft": KEY, "judge": "own"}


def test_replaced_image_is_captioned_anew(photos: Path) -> None:
    with VisionServer() as server:
        ask(photos, server)
        before = captions(photos)
        draw("green", "triangle").save(photos / "owl" / "1.png")
        assert ask(photos, server).accepted == 4
        assert server.kinds()[8:] == ["draft", "judge"]
    changed = {
        name for name, entry in captions(photos).items() if entry != before[name]
    }
    assert changed == {"owl/1.png"}
    (photos / "owl" / "1.png").write_bytes(b"")
    with VisionServer() as server:
        assert list(ask(photos, server).left_out) == ["owl/1.png"]
        assert server.asked == []
    assert "owl/1.png" not in captions(photos)


@pytest.mark.slow
def test_killed_run_resumes_without_repeated_requests(photos: Path) -> None:
    out = photos.parent / "captions.json"
    arguments = [
        "--images",
        photos,
        "--out",
        out,
        "--model",
        "small",
        "--concurrency",
        "1",
    ]
    hold: Behave = lambda asked, n: (  # noqa: E731
        Raw(wait=60) if len(server.asked) == 6 else good(asked)
    )
    with VisionServer(hold) as server:
        command = ["data", "caption", "--url", server.url, *map(str, arguments)]
        process = Command("app.cli", *command, stdout=os.devnull, stderr=os.devnull)
        until = time.monotonic() + 120
        while len(server.asked) < 6 and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = len(server.asked)
        server.behave = good
        done = dcar(*command)
    assert before == 6
    assert done.returncode == 0, done.stderr
    assert "4 captions" in done.stdout
    answered = [(a.kind, a.image, a.turn) for a in server.asked]
    del answered[5]  # the one that was under way
    assert len(answered) == len(set(answered)) == 8


def test_a_run_with_other_settings_is_another_run(photos: Path) -> None:
    with VisionServer() as server:
        ask(photos, server)
        with pytest.raises(
            CaptionError, match=r"made with other settings: rounds \(was 3\); use those"
        ):
            ask(photos, server, rounds=5)
        # the way of asking changes no response
        assert ask(photos, server, concurrency=4, tries=2).accepted == 4
        assert len(server.asked) == 8
        assert ask(photos, server, rounds=5, restart=True).accepted == 4
        assert len(server.asked) == 16
        with (
            FileLock(photos.parent / ".captions.json.lock"),
            pytest.raises(LockedError, match="another run is writing"),
        ):
            ask(photos, server)


@pytest.mark.slow
def test_full_disk_ends_the_run_before_any_request(photos: Path) -> None:
    with VisionServer() as server:
        given = [
            "--images",
            photos,
            "--out",
            photos.parent / "captions.json",
            "--url",
            server.url,
            "--model",
            "small",
        ]
        done = dcar("data", "caption", *given, file_size=1024)
        assert "captions.journal.sqlite cannot be used: " in done.stderr
        assert server.asked == []


def test_another_file_is_no_journal(photos: Path) -> None:
    (photos.parent / "captions.journal.sqlite").write_text("a letter" * 100)
    with (
        VisionServer() as server,
        pytest.raises(CaptionError, match=r"file is not a database; .* move the file"),
    ):
        ask(photos, server)


def test_responses_are_kept_if_annotations_cannot_be_written(photos: Path) -> None:
    with VisionServer() as server:
        (photos.parent / "captions.json").mkdir()
        (photos.parent / "captions.journal.sqlite").touch()
        with pytest.raises(IsADirectoryError):
            ask(photos, server)
        (photos.parent / "captions.json").rmdir()
        asked = len(server.asked)
        assert ask(photos, server).accepted == 4
        assert len(server.asked) == asked


def no_fantasy(asked: Asked, _: int = 0) -> str:
    """Return one caption for all images of a category, unless another is asked for."""
    if asked.kind == "draft" and asked.turn == 0:
        return f"Any {asked.category} on grass."
    return good(asked)


@pytest.mark.parametrize("to", ["owl/0.png", "birds/owl/1.png"])
def test_moved_image_keeps_its_caption(photos: Path, to: str) -> None:
    with VisionServer(no_fantasy) as server:
        ask(one_image(photos), server)
        (photos / to).parent.mkdir(parents=True, exist_ok=True)
        (photos / "owl" / "1.png").rename(photos / to)
        for _ in range(2):
            found = ask(photos, server)
            assert (found.accepted, found.rejected, len(server.asked)) == (1, {}, 2)
            assert {
                name: entry["positive"] for name, entry in captions(photos).items()
            } == {to: "Any owl on grass."}


def test_copies_and_images_of_another_category_are_captioned(photos: Path) -> None:
    with VisionServer(no_fantasy) as server:
        ask(one_image(photos), server)
        shutil.copy(photos / "owl" / "1.png", photos / "owl" / "0.png")
        shutil.copy(photos / "owl" / "1.png", photos / "red_fox" / "1.png")
        found = ask(photos, server)
    assert (found.accepted, found.rejected) == (
        3,
        {"another image has the same caption": 1},
    )
    said = {name: entry["positive"] for name, entry in captions(photos).items()}
    # of equal images the first keeps the caption
    assert said.pop("owl/1.png").startswith("A owl on grass, number ")
    assert said == {
        "owl/0.png": "Any owl on grass.",
        "red_fox/1.png": "Any red fox on grass.",
    }


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
    assert (found.accepted, list(found.left_out), found.rejected) == (
        1,
        ["owl/0.png"],
        {},
    )


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
    assert (found.accepted, found.rejected) == (
        2,
        {"another image has the same caption": 1},
    )
    assert captions(photos)["owl/1.png"]["positive"] == "Any owl on grass."
