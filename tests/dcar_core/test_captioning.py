"""Captions from a real HTTP server that speaks the protocol: data sets, drafts and their judge, costs."""

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dcar_core.captioning.options import VisionModel
from dcar_core.captioning.questions import (
    QUESTION_TEMPLATES,
    Judgement,
    load_templates,
    question,
    read_verdict,
    tidy_draft,
)
from dcar_core.data import Annotations
from dcar_core.util.errors import DataError
from tests.support.captioning import KEY, ask, captions, one_image, rejected
from tests.support.commands import dcar
from tests.support.images import draw
from tests.support.paths import ROOT
from tests.support.vision_server import Asked, Behave, VisionServer, good, message


def test_a_folder_for_each_category_becomes_a_data_set(photos: Path) -> None:
    (photos / "birds" / "barn_owl").mkdir(parents=True)
    Image.new("RGB", (900, 300), "green").save(photos / "birds" / "barn_owl" / "wide.jpg")
    (photos / "owl" / "cut.png").write_bytes((photos / "owl" / "1.png").read_bytes()[:60])
    draw("red", "square").save(photos / "loose.png")
    (photos / "more").symlink_to(photos / "birds")
    (photos / "owl" / "notes.txt").write_text("not a picture")
    with VisionServer() as server:
        found = ask(photos, server, key=f" {KEY}\r\n", side=256)
    assert found.accepted == 5
    assert found.loose == ["loose.png"]
    assert found.linked == ["more"]
    assert list(found.broken) == ["owl/cut.png"]
    entries = captions(photos)
    assert set(entries) == {"birds/barn_owl/wide.jpg", *(f"{c}/{i}.png" for c in ("owl", "red_fox") for i in (1, 2))}
    assert entries["birds/barn_owl/wide.jpg"]["meta_category"] == "birds"
    data, _ = Annotations(photos.parent / "captions.json", photos).load("train")
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
        ("{category} {", "no other braces"),
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
    with VisionServer(lambda *_: "I'm sorry, I can't help.") as server:
        command[3], command[command.index("--out") + 1] = server.url, str(photos.parent / "none.json")
        done = dcar(*command, environment=environment)
        assert (done.returncode, "none.json: 0 captions" in done.stdout) == (1, True)
    without = "import sys; sys.modules['openai'] = None; sys.argv[0] = 'dcar'; from app.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", without, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: captioning needs an optional dependency: pip install 'dcar[caption]'"


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
def test_rejected_draft_is_kept_with_its_reason_and_repeated(photos: Path, draft: str) -> None:
    with VisionServer(lambda asked, n: draft if asked.kind == "draft" and asked.turn == 0 else good(asked)) as server:
        found = ask(one_image(photos), server)
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


def test_no_two_images_share_a_caption(photos: Path) -> None:
    def behave(asked: Asked, n: int) -> str:
        return f"a  {asked.category}." if asked.kind == "draft" and asked.turn == 0 else good(asked)

    with VisionServer(behave) as server:
        found = ask(photos, server)
    assert found.accepted == 4
    assert [line["reason"] for line in rejected(photos)] == ["another image has the same caption"] * 2
    texts = [entry["positive"].casefold() for entry in captions(photos).values()]
    assert len(set(texts)) == 4


def test_judge_decides_within_a_limited_number_of_rounds(photos: Path) -> None:
    def behave(asked: Asked, n: int) -> str:
        return '{"accept": false, "feedback": "It is dusk, not noon."}' if asked.kind == "judge" else good(asked)

    with VisionServer(behave) as server:
        found = ask(one_image(photos), server, rounds=3)
        assert (found.accepted, found.given_up) == (0, ["owl/1.png"])
        assert server.kinds() == ["draft", "judge"] * 3
        assert "It is dusk, not noon." in server.asked[2].text
        assert found.rejected == {"rejected by the judge": 3}
        assert [line["feedback"] for line in rejected(photos)] == ["It is dusk, not noon."] * 3
        assert ask(photos, server, rounds=3).given_up == ["owl/1.png"]
        assert len(server.asked) == 6  # not asked again
    assert captions(photos) == {}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ('{"accept": true, "feedback": "good"}', Judgement(True, "good")),
        ('Sure:\n```json\n{"accept": "no",\n "feedback": null}\n``` {', Judgement(False, "")),
        ("<think>accept? {no}</think> Reject: the\ncolour is wrong.", Judgement(False, "the colour is wrong.")),
        ('Hm, {"accept": true}?\n</think>\n{"accept": false, "feedback": "no"}', Judgement(False, "no")),
        ("Yes, it fits.</Think> No, it does not.", Judgement(False, "it does not.")),
        ('<think>{"accept": true}', None),
        ('{"accept": false, "feedback": "no \\ud83d good"}', Judgement(False, "no \ufffd good")),
        ('{"accept":' * 100_000, None),
        ("Yes.", Judgement(True, "")),
        ("**Accepted**", Judgement(True, "**")),
        ("North is up", None),
        ('{"verdict": 1}', None),
        ('{"accept": tr', None),
        ("", None),
    ],
)
def test_verdicts_are_parsed(answer: str, verdict: Judgement | None) -> None:
    assert read_verdict(answer) == verdict


def test_missing_verdict_fails_the_image_and_keeps_the_draft(photos: Path) -> None:
    behave: Behave = lambda asked, n: "What a lovely owl" if asked.kind == "judge" else good(asked)  # noqa: E731
    with VisionServer(behave) as server:
        found = ask(one_image(photos), server)
        assert found.failed == {"owl/1.png": "an unusable completion: 'What a lovely owl'"}
        assert server.kinds() == ["draft", *["judge"] * 3]
        assert found.usage["judge"]["requests"] == 3  # paid for, though of no use
        server.behave = good
        found = ask(photos, server)
        assert (found.accepted, found.failed) == (1, {})
        assert server.kinds()[4:] == ["judge"]


LEADS = ("Sure: ", "Sure! Here is the caption: ", "Of course! Here\u2019s the caption:\n\n", "Certainly. The caption: ",
         "Image caption: ", "**The image caption:** ", "Here is a caption for the picture: ")  # fmt: skip
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
        ('<think>an owl?</think>\n**Caption:** "An owl\n on a  branch."', "An owl on a branch."),
        ("An owl? Or two?\n</think>\n\nAn owl.", "An owl."),
        ("<think>an owl?</think> Two. <think>no</think>An owl.", "An owl."),
        ("<think>An owl?", ""),
        ("\u201cAn owl.\u201d", "An owl."),
        ('"An owl and a sign: "open"."', 'An owl and a sign: "open".'),
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
        return question(QUESTION_TEMPLATES, image=image, category="owl", dataset="animals", context=73)

    names = [f"owl/{number}.png" for number in range(30)]
    assert len({asked(name) for name in names}) == len(QUESTION_TEMPLATES)
    assert [asked(name) for name in names] == [asked(name) for name in names]
