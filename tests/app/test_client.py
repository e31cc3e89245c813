"""The Python client against the whole service on a real port, and against services that
misbehave; its package.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dcar_client
import httpx
import pytest
from dcar_client import AsyncClient, Client, NewEvent, ServiceError, models
from pydantic import BaseModel

from app.core.callers import key_hash, new_key
from index_jobs.index.job_queue import JobQueue
from index_jobs.rebuild import rebuild
from tests.support.files import write_jsonl
from tests.support.images import png
from tests.support.paths import ROOT
from tests.support.processes import free_port
from tests.support.service import ADMIN, ODD_ID, serving


class RecordingTransport(httpx.HTTPTransport):
    """Keeps the JSON of the last response, and all methods and paths."""

    def __init__(self) -> None:
        super().__init__()
        self.body: Any = None
        self.asked = set[str]()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.add(
            f"{request.method} {request.url.raw_path.decode().partition('?')[0]}"
        )
        response = super().handle_request(request)
        response.read()
        is_json = "json" in response.headers.get("content-type", "")
        self.body = response.json() if is_json else None
        return response


def models_in(value: Any) -> Iterator[BaseModel]:
    """The models in a response, at any depth."""
    if isinstance(value, BaseModel):
        yield value
        value = [getattr(value, name) for name in type(value).model_fields]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from models_in(each)


def ended_job(index: Path) -> str:
    """Return a job that has all fields."""
    queue = JobQueue(index)
    job = queue.accept("delete", [{"id": "a"}])
    failed = [{"id": "a", "reason": "broken"}]
    progress = {"done": 1, "total": 1}
    outcome = {
        "status": "done",
        "index_version": 1,
        "failed": failed,
        "progress": progress,
        "reason": "as an example",
    }
    queue.end(queue.next_batch(), [outcome])
    return job


def test_every_model_holds_all_that_the_service_sends(
    reranking_index: Path,
    gallery: Path,
    tmp_path: Path,
) -> None:
    index = Path(shutil.copytree(reranking_index, tmp_path / "index"))
    seen: set[type[BaseModel]] = set()
    transport = RecordingTransport()

    def check(value: Any, body: Any) -> None:
        is_model = isinstance(value, BaseModel)
        if is_model:
            dumped = value.model_dump(exclude_unset=True)
        else:
            dumped = [m.model_dump(exclude_unset=True) for m in value]
        assert dumped == body
        seen.update(type(model) for model in models_in(value))

    with (
        serving(
            index,
            admin_key=ADMIN,
            writes=True,
            feedback=True,
            collections_dir=tmp_path / "created",
        ) as (_, port),
        Client(f"http://127.0.0.1:{port}", key=ADMIN, transport=transport) as client,
    ):
        for name in ("health", "readiness", "reload"):
            check(getattr(client, name)(), transport.body)
        check(client.put_collection("lamps"), transport.body)
        check(client.collections(), transport.body["collections"])
        check(
            client.search_text(
                "a red circle",
                explain=True,
                rerank=True,
                fields=["*"],
            ),
            transport.body,
        )
        check(
            client.search_text(
                "a red circle",
                hybrid=True,
                group_by="color",
                facets=["color"],
            ),
            transport.body,
        )
        check(
            client.search_text(
                "a red circle",
                fold=0.5,
                min_score=-1,
                k=2,
            ),
            transport.body,
        )
        query_id = transport.body["query_id"]
        event: NewEvent = {
            "query_id": query_id,
            "client_id": "c",
            "action_name": "click",
            "object_id": "none",
        }
        check(client.feedback([event]), transport.body)
        check(client.search_batch(["red", "blue"], k=2), transport.body["answers"])
        check(
            client.search_image(gallery / "circle/blue.png", explain=True),
            transport.body,
        )
        check(client.similar(ODD_ID), transport.body)
        check(client.items(k=4), transport.body)
        check(client.embeddings(["red", png("red")], model="index"), transport.body)
        check(client.item(ODD_ID), transport.body)
        check(client.teach("odd", [ODD_ID], kind="shape"), transport.body)
        check(client.job(ended_job(index)), transport.body)
        with pytest.raises(ServiceError) as caught:
            client.item("nothing")
        check(caught.value.problem, transport.body)
    lists = {
        models.BatchResponse,
        models.CollectionsResponse,
        models.ConceptsResponse,
        models.JobsResponse,
    }
    every = {
        each
        for each in vars(models).values()
        if isinstance(each, type) and issubclass(each, BaseModel)
    }
    assert seen | lists | {BaseModel, models.Model} == every, (
        "and those whose lists are returned"
    )


def test_searches_and_items(built_index: Path, gallery: Path) -> None:
    key = new_key()
    file = gallery / "circle/blue.png"
    with serving(built_index, api_keys=f"shop:{key_hash(key)}") as (_, port):
        url = f"http://127.0.0.1:{port}"
        with Client(url, key=key) as client:
            (collection,) = client.collections()
            own_options = client.search_batch(
                ["red", {"query": "red", "k": 3, "without": "circle"}], k=2
            )
            assert [len(answer.results) for answer in own_options] == [2, 3]
            circle = {"category": "circle"}
            found = client.search_image(
                file,
                k=1,
                filter=circle,
                less_like=["circle/red.png"],
                fields=["file_name"],
            )
            (by_file,) = found.results
            assert by_file.id == "circle/blue.png"
            assert by_file.metadata == {"file_name": "circle/blue.png"}
            in_batch = client.search_batch(
                [{"image": file}, {"image": file.read_bytes(), "query": "red"}], k=1
            )
            assert in_batch[0].results[0].id == "circle/blue.png"
            circles = client.items(filter=circle, k=4, group_by="")
            assert circles.count == 6
            assert circles.next_offset == 4
            assert [item.category for item in circles.items] == ["circle"] * 4
            by_caption = client.search_image(
                file,
                sort="-caption",
                min_score=-1.0,
                k=1,
            )
            assert by_caption.results[0].caption == "a red triangle"
            assert by_caption.count == 24
            assert client.image("circle/blue.png") == file.read_bytes()
            with pytest.raises(ServiceError, match="There is no item") as caught:
                client.item("nothing")
            assert caught.value.status == 404
            assert caught.value.request_id
            assert caught.value.problem
            assert caught.value.problem.errors
            assert caught.value.problem.errors[0].field == "id"
        with Client(url) as stranger, pytest.raises(ServiceError, match="401"):
            stranger.search_text("red")
        with Client(url, key=key, collection=collection.name) as client:
            assert (
                client.search_text("red")
                .results[0]
                .image_url.startswith(f"/collections/{collection.name}/")
            )


@pytest.mark.usefixtures("no_writer")
async def test_the_async_client_returns_the_same(
    index: Path,
    gallery: Path,
    tmp_path: Path,
) -> None:
    job = ended_job(index)
    file = gallery / "circle/blue.png"
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("search_text", ("a red circle",), {"k": 3}),
        ("search_image", (file, "red"), {"k": 2}),
        ("search_batch", (["red", {"query": "blue", "k": 3}],), {"k": 2}),
        ("embeddings", (["red"],), {}),
        ("similar", (ODD_ID,), {"k": 4}),
        ("items", (), {"filter": {"category": "circle"}, "k": 4}),
        ("item", (ODD_ID,), {}),
        ("image", ("circle/blue.png",), {}),
        (
            "feedback",
            (
                [
                    {
                        "query_id": "x",
                        "client_id": "c",
                        "action_name": "click",
                        "object_id": "a",
                    }
                ],
            ),
            {},
        ),
        (
            "put_items",
            (
                [
                    {"id": "a", "image": file},
                    {"id": "b", "image": png(), "caption": "b"},
                ],
            ),
            {},
        ),
        ("put_item", ({"id": "a", "image": file, "metadata": {"price": 3}},), {}),
        (
            "patch_items",
            ({"metadata": {"price": 3}},),
            {"filter": {"category": "circle"}},
        ),
        ("patch_each", ({"circle": {"price": 3}},), {"by": "category"}),
        ("patch_item", (ODD_ID, {"caption": None}), {}),
        ("delete_items", (["a"],), {}),
        ("delete_item", (ODD_ID,), {}),
        ("jobs", (), {"limit": 3}),
        ("job", (job,), {}),
        ("wait_for_job", (job,), {}),
        ("put_collection", ("lamps",), {"model": "index"}),
        ("collections", (), {}),
        ("health", (), {}),
        ("teach", ("rex", [ODD_ID]), {"kind": "dog"}),
        ("concept", ("rex",), {}),
        ("concepts", (), {}),
        ("readiness", (), {}),
        ("reload", (), {}),
    ]
    public = {name for name in vars(Client) if not name.startswith("_")}
    assert public == {name for name in vars(AsyncClient) if name in public}
    assert {name for name, *_ in calls} == public - {
        "close",
        "delete_collection",
        "forget",
    }
    transport = RecordingTransport()
    with serving(
        index,
        admin_key=ADMIN,
        writes=True,
        feedback=True,
        collections_dir=tmp_path / "created",
    ) as (_, port):
        url = f"http://127.0.0.1:{port}"
        with Client(url, key=ADMIN, transport=transport) as client:
            schema = httpx.get(f"{url}/openapi.json").json()
            async with AsyncClient(url, key=ADMIN) as async_client:
                for name, arguments, options in calls:
                    expected = getattr(client, name)(*arguments, **options)
                    found = await getattr(async_client, name)(*arguments, **options)
                    assert without_timing(found) == without_timing(expected), name
                client.forget("rex")
                with pytest.raises(ServiceError, match="no such name"):
                    await async_client.forget("rex")
                client.delete_collection("lamps")
                with pytest.raises(ServiceError, match="There is no collection"):
                    await async_client.delete_collection("lamps")
                client.put_collection("lamps")
                await async_client.delete_collection("lamps")
                assert [each.name for each in client.collections()] == ["index"]
                with pytest.raises(ServiceError, match="There is no item"):
                    await async_client.item("nothing")
                with pytest.raises(TimeoutError, match="is waiting"):
                    await async_client.wait_for_job(
                        client.delete_items(["a"]).id, timeout_s=0
                    )
    routes = {
        (method.upper(), path)
        for path, operations in schema["paths"].items()
        for method in operations
    }
    of_others = [
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{collection}"),
    ]
    assert [
        (method, path)
        for method, path in sorted(routes)
        if not path.startswith("/collections/{collection}/")
        and not any(
            re.fullmatch(f"{method} {re.sub(r'{.*?}', '[^/]+', path)}", each)
            for each in transport.asked
        )
    ] == of_others, "routes that no method calls"


def without_timing(value: Any) -> Any:
    if isinstance(value, list):
        return [without_timing(each) for each in value]
    changes: dict[str, Any] = (
        {"took_ms": 0.0, "cached": False, "query_id": None}
        if isinstance(value, models.SearchResponse)
        else {}
    )
    if isinstance(value, models.JobResponse):  # each call accepts another job
        changes = {"id": "", "accepted": "", "reason": None}
    return value.model_copy(update=changes) if isinstance(value, BaseModel) else value


def test_ids_that_look_like_lists_and_items_without_the_group_field(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    odd = ["[2024]", '["a"]', "[]", "a", "2024"]
    for number, color in enumerate(("red", "green", "blue", "black", "white")):
        (tmp_path / f"{number}.png").write_bytes(png(color))
    rows = [
        {"file_name": f"{number}.png", "id": each} for number, each in enumerate(odd)
    ]
    write_jsonl(
        tmp_path / "metadata.jsonl",
        rows[0] | {"product": "A"},
        *rows[1:],
    )
    rebuild(tmp_path, tiny_checkpoint, tmp_path / "index", workers=0, progress=False)
    with (
        serving(tmp_path / "index") as (_, port),
        Client(f"http://127.0.0.1:{port}") as client,
    ):
        for each in odd:
            response = client.search_image(
                png(),
                more_like=[each, "a"],
                less_like=["2024"],
            )
            assert each not in [result.id for result in response.results]
        groups = [
            result.group
            for result in client.search_text("red", group_by="product").results
        ]
        assert sorted(group.value or "" for group in groups if group) == [
            "",
            "",
            "",
            "",
            "A",
        ]


async def test_both_clients_retry() -> None:
    statuses = iter(2 * [None, 429, 503, 200])

    def respond(request: httpx.Request) -> httpx.Response:
        status = next(statuses)
        if status is None:
            raise httpx.ConnectTimeout("timed out")
        return httpx.Response(
            status,
            headers={"retry-after": "7"},
            json={"status": "ok"},
        )

    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async with AsyncClient(
        "http://busy",
        transport=httpx.MockTransport(respond),
        sleep=sleep,
        retries=3,
    ) as client:
        assert (await client.health()).status == "ok"
    with Client(
        "http://busy",
        transport=httpx.MockTransport(respond),
        sleep=waits.append,
        retries=3,
    ) as blocking:
        assert blocking.health().status == "ok"
    assert waits == 2 * [0.5, 7, 7]
    with (
        Client(f"http://127.0.0.1:{free_port()}", sleep=waits.append) as absent,
        pytest.raises(httpx.ConnectError),
    ):
        absent.readiness()
    assert len(waits) == 8, "two retries by default"
    statuses = iter([503, None])
    async with AsyncClient(
        "http://busy",
        transport=httpx.MockTransport(respond),
        sleep=sleep,
        retries=0,
    ) as client:
        with pytest.raises(ServiceError, match="503"):
            await client.health()
        with pytest.raises(httpx.ConnectTimeout):
            await client.health()


@pytest.mark.parametrize(
    ("status", "text"),
    [(502, "<html>Bad Gateway</html>"), (200, "<html>Please log in</html>")],
)
def test_a_response_of_something_else_is_a_service_error(
    status: int, text: str
) -> None:
    proxy = httpx.MockTransport(lambda request: httpx.Response(status, text=text))
    with Client("http://proxy", transport=proxy) as client:
        for call in (
            client.readiness,
            lambda: client.image("a"),
            lambda: client.delete_collection("a"),
        ):
            with pytest.raises(ServiceError, match=str(status)) as caught:
                call()
            assert caught.value.problem is None


@pytest.mark.parametrize(
    ("retry_after", "waits"),
    [
        ("7", [7]),
        ("-5", [1]),
        ("nan", [1]),
        ("soon", [1]),
        ("Mon, 02 Jan 2006 15:04:05 GMT", [0]),
        ("31", []),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", [1]),
        ("inf", []),
        ("Fri, 31 Dec 2999 23:59:59 GMT", []),
    ],
)
def test_retry_after_is_honoured_up_to_the_longest_wait(
    retry_after: str, waits: list[float]
) -> None:
    found: list[float] = []
    busy = httpx.MockTransport(
        lambda request: httpx.Response(503, headers={"retry-after": retry_after})
    )
    with (
        Client("http://busy", transport=busy, sleep=found.append, retries=1) as client,
        pytest.raises(ServiceError, match="503"),
    ):
        client.readiness()
    assert found == waits


def test_dots_cannot_be_names() -> None:
    with (
        Client("http://service") as client,
        pytest.raises(ValueError, match=r"'\.\.' cannot be"),
    ):
        client.item("..")
    with pytest.raises(ValueError, match=r"'\.' cannot be"):
        Client("http://service", collection=".")


PACKAGE = ROOT / "clients" / "python"


def test_the_openapi_document_and_the_generated_models_are_up_to_date() -> None:
    script = ROOT / "scripts" / "generate_client_models.py"
    done = subprocess.run(
        [sys.executable, script, "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_model_is_exported() -> None:
    own = {
        name
        for name, each in vars(models).items()
        if isinstance(each, type) and each.__module__ == models.__name__
    }
    assert own - {*dcar_client.__all__} == {"Model"}


def test_the_client_depends_on_httpx_and_pydantic_alone() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    assert {
        re.split(r"[<>=]", dependency)[0] for dependency in project["dependencies"]
    } == {"httpx", "pydantic"}
    code = (
        "import sys, dcar_client; sys.exit(bool({'torch', 'faiss', 'numpy', 'app',"
        " 'dcar_core'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE / "src")}
    assert (
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=PACKAGE,
            env=environment,
        ).returncode
        == 0
    )


def test_the_readme_names_every_method() -> None:
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    methods = [
        name for name in vars(Client) if not name.startswith("_") and name != "close"
    ]
    assert [name for name in methods if f"`{name}(" not in readme] == []
