"""An endpoint that misbehaves in every way: a real HTTP server that speaks the protocol."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dcar_core.captioning.options import VisionModel
from dcar_core.util.errors import CaptionError, DataError
from tests.support.captioning import KEY, ask, captions, one_image, rejected
from tests.support.vision_server import Asked, Raw, VisionServer, good, message

TRANSIENT = {
    "429": Raw(429, "slow down"),
    "503": Raw(503, headers=(("retry-after", "0.2"),)),
    "too slow": Raw(body=json.dumps(message("late")), wait=1.5),
    "a closed connection": Raw(silent=True),
    "half an answer": Raw(body=json.dumps(message("half")), cut=True),
    "gzip that is none": Raw(body=b"\x1f\x8bhalf", headers=(("content-encoding", "gzip"),)),
}
REFUSAL = {"choices": [{"message": {"content": None, "refusal": "No owl may be described."}}]}
UNUSABLE: dict[str, Raw | dict[str, Any]] = {
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


@pytest.mark.parametrize("how", [*TRANSIENT, *UNUSABLE])
@pytest.mark.slow
def test_transient_errors_are_retried(photos: Path, how: str) -> None:
    def behave(asked: Asked, n: int) -> str | Raw | dict[str, Any]:
        return (TRANSIENT | UNUSABLE)[how] if n == 0 else good(asked)

    with VisionServer(behave) as server:
        found = ask(one_image(photos), server, tries=4, timeout_s=0.5 if how == "too slow" else 20.0)
    assert (found.accepted, found.failed) == (1, {})
    assert server.kinds() == ["draft", "draft", "judge", "judge"]
    assert found.usage["draft"]["requests"] == (2 if how in UNUSABLE else 1)


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.slow
def test_images_are_captioned_concurrently(photos: Path, most: int) -> None:
    def behave(asked: Asked, n: int) -> Raw:
        full = time.monotonic() + 5
        while server.at_once < most and time.monotonic() < full:
            time.sleep(0.005)
        return Raw(body=json.dumps(message(good(asked))), wait=0.1)  # a request too many would arrive meanwhile

    with VisionServer(behave) as server:
        assert ask(photos, server, judge=False, concurrency=most).accepted == 4
        assert server.at_once == most


@pytest.mark.slow
def test_an_image_fails_after_its_last_attempt(photos: Path) -> None:
    with VisionServer(lambda asked, n: Raw(429, "slow down")) as server:
        found = ask(photos, server, tries=1, judge=False)
        assert (found.failed["owl/1.png"], len(server.asked)) == ("429 slow down", 4)
        server.behave = lambda asked, n: good(asked) if asked.image == server.asked[4].image else Raw(silent=True)
        found = ask(photos, server, concurrency=1, tries=1, judge=False)
        assert found.failed["owl/2.png"].startswith("no response in 1 attempts: Connection error.")
        server.behave = lambda asked, n: Raw(body=json.dumps(message("late")), drip=0.1)
        found = ask(photos, server, concurrency=1, tries=1, judge=False, timeout_s=0.3)
    assert found.failed["owl/2.png"] == "no response in 1 attempts: too slow"


@pytest.mark.parametrize(
    "content", [[{"text": "An owl"}, {"text": None}, {"type": "image"}, "on grass."], {"text": "An owl on grass."}]
)
@pytest.mark.parametrize("usage", [[1], "many", {"prompt_tokens": None, "completion_tokens": "3"}])
@pytest.mark.slow
def test_other_response_forms_are_read(photos: Path, content: Any, usage: Any) -> None:
    with VisionServer(lambda asked, n: message(content, usage=usage)) as server:
        found = ask(one_image(photos), server, judge=False)
    assert (found.accepted, len(server.asked), found.usage["draft"]["unknown"]) == (1, 1, 1)
    assert [entry["positive"] for entry in captions(photos).values()] == ["An owl on grass."]


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
def test_rejected_drafts_name_the_finish_reason(photos: Path, answer: dict[str, Any], reason: str) -> None:
    with VisionServer(lambda asked, n: answer if asked.kind == "draft" and asked.turn == 0 else good(asked)) as server:
        found = ask(one_image(photos), server)
        assert found.accepted == 1
        assert [line["reason"] for line in rejected(photos)] == [reason]
        server.behave = lambda asked, n: good(asked) if asked.kind == "draft" else REFUSAL
        found = ask(photos, server, photos.parent / "other.json")
    assert list(found.failed.values()) == ["an unusable completion: 'No owl may be described.'"]  # no verdict


@pytest.mark.parametrize(
    ("status", "says"), [(401, "refuses the key"), (403, "refuses the key"), (404, "no such model")]
)
def test_permanent_errors_end_the_run(photos: Path, status: int, says: str) -> None:
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
@pytest.mark.slow
def test_messages_never_show_the_key(photos: Path, answer: Raw | str | dict[str, Any]) -> None:
    def behave(asked: Asked, n: int) -> Raw | str | dict[str, Any]:
        return good(asked) if isinstance(answer, str) and asked.kind == "draft" else answer

    with VisionServer(behave) as server:
        found = ask(photos, server, key=KEY, concurrency=1, tries=2)
    assert len(found.failed) == 4
    assert not any(KEY[:8] in why for why in found.failed.values())


@pytest.mark.parametrize("odd", ["\n", "\0", "\u00e9", "\udcff"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(odd: str) -> None:
    with pytest.raises(DataError, match="characters that are not printable ASCII") as caught:
        VisionModel(url="http://127.0.0.1:8000/v1", name="m", key=f"{KEY}{odd}x")
    assert KEY not in str(caught.value)


def test_half_of_a_surrogate_pair_is_replaced(photos: Path) -> None:
    """JSON can say it, a file cannot hold it."""
    with VisionServer(lambda asked, n: good(asked) + (" \ud83d" if asked.kind == "draft" else "")) as server:
        found = ask(one_image(photos), server)
    assert found.accepted == 1


@pytest.mark.parametrize("status", [400, 403])
def test_refused_request_fails_its_own_image(photos: Path, status: int) -> None:
    def behave(asked: Asked, n: int) -> str | Raw:
        second = len({each.image for each in server.asked}) % 2 == 0
        return Raw(status, "image too odd") if second else good(asked)

    with VisionServer(behave) as server:
        found = ask(photos, server, concurrency=1, give_up_after=2)  # scattered failures do not end the run
    assert found.accepted == 2
    assert found.failed == dict.fromkeys(["owl/2.png", "red_fox/2.png"], f"{status} image too odd")
    assert f"2 images failed, retried by the same command: owl/2.png ({status} image too odd)" in str(found)


@pytest.mark.parametrize("metadata", [{"reasons": ["violence"]}, {"flagged_input": "A photo of"}])
def test_images_that_moderation_flags_are_given_up(photos: Path, metadata: dict[str, Any]) -> None:
    error = {"code": 403, "message": f"for {KEY} flagged", "metadata": metadata}
    flagged = Raw(403, json.dumps({"error": error}))
    first: list[str] = []

    def behave(asked: Asked, n: int) -> str | Raw:
        first.append(asked.image)
        return flagged if asked.image == first[0] else good(asked)

    with VisionServer(behave) as server:
        found = ask(photos, server, concurrency=1, rounds=1, give_up_after=1, key=KEY)
        assert (found.accepted, found.given_up, found.failed) == (3, ["owl/1.png"], {})
        assert [(kept["reason"], kept["draft"]) for kept in rejected(photos)] == [("a refusal", "for flagged")]
        count = len(server.asked)
        ask(photos, server, concurrency=1, rounds=1, give_up_after=1, key=KEY)
        assert len(server.asked) == count
        server.behave = lambda asked, n: flagged if asked.kind == "judge" else good(asked)
        found = ask(one_image(photos), server, photos.parent / "other.json", key=KEY)
    assert list(found.failed.values()) == ["an unusable completion: 'for *** flagged'"]


def test_consecutive_failures_end_the_run(photos: Path) -> None:
    with VisionServer(lambda asked, n: Raw(400, "no pictures here")) as server:
        with pytest.raises(
            CaptionError, match=r"3 consecutive images failed; the last, red_fox/1\.png: 400 no pictures"
        ):
            ask(photos, server, concurrency=1, give_up_after=3)
        assert len(server.asked) == 3
    with (
        VisionServer(lambda asked, n: good(asked) if asked.kind == "draft" else "Hm.") as server,
        pytest.raises(CaptionError, match=r"2 consecutive images failed"),  # however good the drafts are
    ):
        ask(photos, server, photos.parent / "other.json", concurrency=1, give_up_after=2)


def test_address_that_never_answered_ends_the_run(photos: Path) -> None:
    with VisionServer(lambda asked, n: good(asked)) as server:
        pass  # it is gone
    with pytest.raises(CaptionError, match=r"/chat/completions cannot be reached .* start the model's server"):
        ask(photos, server, tries=1)


@pytest.mark.parametrize(("name", "value"), [("ALL_PROXY", "socks4://127.0.0.1:9"), ("SSL_CERT_FILE", "/none.pem")])
def test_proxies_and_certificates_that_cannot_be_used_end_the_run(
    name: str, value: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("SSL_CERT_DIR")
    monkeypatch.setenv("NO_PROXY", "")
    with VisionServer() as server, pytest.raises(CaptionError, match=r"/chat/completions cannot be requested \("):
        ask(photos, server)
    assert server.asked == []


def test_key_is_sent_to_its_own_host_only() -> None:
    drafter = VisionModel(url="https://one.example/v1", name="m", key=KEY, price=(1, 2))
    assert drafter.judge(None, "other", None, None).key == KEY
    assert drafter.judge("https://one.example/v2", None, None, None).key == KEY
    for elsewhere in ("https://two.example/v1", "http://one.example/v1", "https://one.example:8443/v1"):
        assert drafter.judge(elsewhere, None, None, None).key is None
        assert drafter.judge(elsewhere, None, "own", None).key == "own"
    assert drafter.judge(None, None, None, None).price == (1, 2)
    assert drafter.judge(None, "other", None, None).price is None
    assert KEY not in repr(drafter)
