"""The client against the whole service on a real port."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.client import Client, ServiceError
from app.core.keys import key_hash, new_key
from index_jobs.rebuild import rebuild
from tests.support.images import png
from tests.support.processes import free_port
from tests.support.service import ODD_ID, serving

ADMIN = "correct horse battery"


def test_everything_that_the_service_does(built_index: Path, gallery: Path) -> None:
    key = new_key()
    with serving(built_index, api_keys=f"shop:{key_hash(key)}", admin_key=ADMIN) as (_, port):
        url = f"http://127.0.0.1:{port}"
        with Client(url, key=key) as client:
            assert client.ready().count == 24
            (collection,) = client.collections()
            found = client.search_text("a red circle", k=3, filter={"category": "circle"})
            assert [result.rank for result in found.results] == [1, 2, 3]
            assert {result.category for result in found.results} == {"circle"}
            assert client.search_text("a red circle", k=3, offset=3).results[0].rank == 4
            answers = client.search_batch(["red", "blue"], k=2)
            assert [len(answer.results) for answer in answers] == [2, 2]
            each = client.search_batch(["red", {"query": "red", "k": 3, "without": "circle"}], k=2)
            assert [len(answer.results) for answer in each] == [2, 3]
            file = gallery / "circle/blue.png"
            by_file = client.search_image(file, k=2, filter={"category": "circle"}, less_like=["circle/red.png"])
            assert by_file.results[0].id == "circle/blue.png"
            assert client.search_image(file.read_bytes(), "red", weights={"image": 0.5}).results
            assert client.similar("circle/red.png", k=4).results
            assert client.item(ODD_ID).id == ODD_ID
            with_fields = client.search_image(file, k=1, fields=["file_name"]).results[0]
            assert with_fields.metadata == {"file_name": "circle/blue.png"}
            circles = client.items(filter={"category": "circle"}, k=4)
            assert (circles.count, [item.category for item in circles.items]) == (6, ["circle"] * 4)
            assert client.items(filter={"category": "circle"}, offset=4).next_offset is None
            assert client.image("circle/blue.png") == file.read_bytes()
            with pytest.raises(ServiceError, match="There is no item") as caught:
                client.item("nothing")
            assert caught.value.status == 404
            assert caught.value.problem is not None
            assert caught.value.problem.errors is not None
            assert caught.value.problem.errors[0].field == "id"
            assert caught.value.request_id
            with pytest.raises(ServiceError, match="k: "):
                client.search_image(png(), k=0)
        with Client(url, key=key, collection=collection.name) as client:
            assert client.search_text("red").results[0].image_url.startswith(f"/collections/{collection.name}/")
        with Client(url, key=ADMIN) as admin:
            assert not admin.reload().changed
        with Client(url) as stranger, pytest.raises(ServiceError) as caught:
            stranger.search_text("red")
        assert caught.value.status == 401


def test_ids_that_look_like_lists(tiny_checkpoint: Path, tmp_path: Path) -> None:
    odd = ["[2024]", '["a"]', "[]", "a", "2024"]
    for number, color in enumerate(("red", "green", "blue", "black", "white")):
        (tmp_path / f"{number}.png").write_bytes(png(color))
    lines = [json.dumps({"file_name": f"{number}.png", "id": each}) for number, each in enumerate(odd)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    rebuild(tmp_path, tiny_checkpoint, tmp_path / "index", workers=0, progress=False)
    with serving(tmp_path / "index") as (_, port), Client(f"http://127.0.0.1:{port}") as client:
        for each in odd:
            for found in (
                client.search_text("", more_like=[each]),
                client.search_image(png(), more_like=[each]),
                client.search_image(png(), more_like=[each, "a"], less_like=["2024"]),
            ):
                assert each not in [result.id for result in found.results]


def test_it_waits_as_it_is_told_and_gives_up_in_the_end(built_index: Path) -> None:
    with serving(built_index, rate_limit="2/minute") as (_, port):
        waited: list[float] = []
        with Client(f"http://127.0.0.1:{port}", sleep=waited.append, retries=3) as client:
            client.search_text("red")
            client.search_text("red")
            with pytest.raises(ServiceError) as caught:
                client.search_text("red")
        assert caught.value.status == 429
        assert len(waited) == 3
        assert all(1 <= pause <= 30 for pause in waited)


def test_a_service_that_cannot_be_reached_in_time_is_tried_again() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if len(asked) == 1:
            raise httpx.ConnectTimeout("timed out")
        return httpx.Response(502)

    waited: list[float] = []
    transport: Any = httpx.MockTransport(answer)
    with Client("http://far", transport=transport, sleep=waited.append) as client, pytest.raises(ServiceError):
        client.ready()
    assert len(asked) == 2
    assert len(waited) == 1


def test_a_service_that_is_not_there_or_is_none() -> None:
    waited: list[float] = []
    with Client(f"http://127.0.0.1:{free_port()}", sleep=waited.append) as client, pytest.raises(httpx.ConnectError):
        client.ready()
    assert len(waited) == 2

    def other(request: httpx.Request) -> httpx.Response:
        return httpx.Response(502, text="<html>Bad Gateway</html>")

    transport: Any = httpx.MockTransport(other)
    with Client("http://proxy", transport=transport) as client, pytest.raises(ServiceError, match="502") as caught:
        client.ready()
    assert caught.value.problem is None

    page: Any = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>Please log in</html>"))
    with Client("http://portal", transport=page) as client:
        for ask in (client.ready, lambda: client.image("a")):
            with pytest.raises(ServiceError, match="200"):
                ask()


@pytest.mark.parametrize(("said", "pause"), [("-5", 1), ("nan", 1), ("soon", 1), ("7", 7), ("1e9", 30), ("inf", 30)])
def test_it_waits_no_odd_time(said: str, pause: float) -> None:
    waited: list[float] = []
    busy: Any = httpx.MockTransport(lambda request: httpx.Response(503, headers={"retry-after": said}))
    with (
        Client("http://busy", transport=busy, sleep=waited.append, retries=1) as client,
        pytest.raises(ServiceError, match="503"),
    ):
        client.ready()
    assert waited == [pause]


def test_dots_are_no_names() -> None:
    asked: list[str] = []
    seen: Any = httpx.MockTransport(lambda request: asked.append(str(request.url)) or httpx.Response(404))
    with Client("http://service", transport=seen) as client, pytest.raises(ValueError, match=r"'\.\.' is no name"):
        client.item("..")
    with pytest.raises(ValueError, match=r"'\.' is no name"):
        Client("http://service", collection=".")
    assert asked == []
