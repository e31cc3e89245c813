"""Unusable drafts, and the judge of usable ones."""

from pathlib import Path

import pytest

from dcar_core.captioning.questions import QUESTION_TEMPLATES, Judgement, question, read_verdict, tidy_draft
from tests.support.captioning import ask, captions, one_image, rejected
from tests.support.vision_server import Asked, Behave, VisionServer, good

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
