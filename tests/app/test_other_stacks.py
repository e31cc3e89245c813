"""Clients that others wrote, against the running service: OpenAI's, MCP's, LangChain's
and LlamaIndex's.

LlamaIndex is not part of the extra `stacks`: install `.[dev,stacks]` and
`llama-index-core` in another environment.
"""

import base64
import importlib.util
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dcar_client import AsyncClient, Client, ServiceError
from PIL import Image

from tests.support.images import png
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.service import ALICE, KEYS, ODD_ID, serving

CLIENT = str(ROOT / "clients" / "python" / "src")


@pytest.fixture(scope="module")
def url(built_index: Path) -> Iterator[str]:
    """The service on a port, open to those who have a key."""
    with serving(built_index, **KEYS) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, key=ALICE) as client:
        yield client


@needs("openai")
def test_the_openai_client_gets_the_vectors_of_the_service(
    url: str, client: Client
) -> None:
    import openai

    expected = client.embeddings(["a red circle", png("red")])
    text, image = (np.array(each.embedding) for each in expected.data)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=ALICE, max_retries=0) as foreign:
        found = foreign.embeddings.create(model="index", input=["a red circle"])
        assert found.object == "list"
        assert found.model == "index"
        assert found.to_dict()["fingerprint"] == expected.fingerprint
        np.testing.assert_allclose(found.data[0].embedding, text, atol=1e-6)
        given: Any = {"image": base64.b64encode(png("red")).decode()}
        (vector,) = foreign.embeddings.create(
            model="index",
            input=given,
            encoding_format="float",
        ).data
        np.testing.assert_allclose(vector.embedding, image, atol=1e-6)
        with pytest.raises(
            openai.NotFoundError,
            match="There is no collection 'text-embedding-3-small'",
        ):
            foreign.embeddings.create(model="text-embedding-3-small", input="red")
        assert [each.id for each in foreign.models.list()] == ["index"]
        assert foreign.models.retrieve("index") == next(iter(foreign.models.list()))
        with pytest.raises(openai.NotFoundError, match="There is no collection 'gpt'"):
            foreign.models.retrieve("gpt")
        with pytest.raises(
            openai.NotFoundError, match="There is nothing at /v1/chat/completions"
        ):
            foreign.chat.completions.create(model="index", messages=[])


@asynccontextmanager
async def assistant(url: str, *options: str, key: str = ALICE) -> AsyncIterator[Any]:
    """MCP's own client, of a server that it starts as assistants do."""
    from mcp import Client as AssistantClient
    from mcp import StdioServerParameters, stdio_client

    arguments = [
        "-m",
        "dcar_client.mcp",
        "--url",
        url,
        "--api-key-env",
        "SEARCH_KEY",
        *options,
    ]
    environment = {"SEARCH_KEY": key, "PYTHONPATH": CLIENT}
    program = StdioServerParameters(
        command=sys.executable,
        args=arguments,
        env=environment,
    )
    with open(os.devnull, "w") as log:  # noqa: PTH123
        async with AssistantClient(stdio_client(program, errlog=log)) as client:
            yield client


def pictures(content: list[Any]) -> list[Image.Image]:
    images = [each for each in content if each.type == "image"]
    opened: list[Image.Image] = [
        Image.open(BytesIO(base64.b64decode(each.data))) for each in images
    ]
    assert [f"image/{image.format}".lower() for image in opened] == [
        each.mime_type for each in images
    ]
    return opened


@needs("mcp")
@pytest.mark.slow
async def test_an_assistant_searches_over_mcp(
    url: str,
    client: Client,
    gallery: Path,
) -> None:
    async with assistant(url, "--pictures", str(gallery)) as mcp:
        tools = {tool.name: tool for tool in (await mcp.list_tools()).tools}
        assert set(tools) == {
            "search_by_words",
            "search_by_picture",
            "similar_items",
            "get_item",
        }
        assert all(
            tool.annotations.read_only_hint and tool.output_schema
            for tool in tools.values()
        )

        options = {
            "k": 3,
            "filter": {"category": "circle"},
            "fields": ["color"],
        }
        found = await mcp.call_tool(
            "search_by_words", {"query": "a red circle", **options, "thumbnails": True}
        )
        expected = client.search_text(
            "a red circle",
            k=3,
            filter={"category": "circle"},
            fields=["color"],
        )
        results = found.structured_content["results"]
        assert [result["id"] for result in results] == [
            result.id for result in expected.results
        ]
        assert [result["metadata"] for result in results] == [
            result.metadata for result in expected.results
        ]
        assert results[0]["image_url"] == url + expected.results[0].image_url
        assert json.loads(found.content[0].text) == found.structured_content
        assert len(pictures(found.content)) == 3

        file = gallery / "circle/blue.png"
        for given in (
            {"file": "circle/blue.png"},
            {"image": base64.b64encode(file.read_bytes()).decode()},
        ):
            found = await mcp.call_tool("search_by_picture", {**given, "k": 1})
            assert [result["id"] for result in found.structured_content["results"]] == [
                "circle/blue.png"
            ]
            assert pictures(found.content) == []
        found = await mcp.call_tool("similar_items", {"item_id": ODD_ID, "k": 2})
        similar = client.similar(ODD_ID, k=2)
        assert [item["id"] for item in found.structured_content["results"]] == [
            item.id for item in similar.results
        ]
        found = await mcp.call_tool("get_item", {"item_id": ODD_ID, "thumbnail": True})
        assert found.structured_content["metadata"] == client.item(ODD_ID).metadata
        assert len(pictures(found.content)) == 1

        outside = "../" * 20 + "etc/hostname"
        bad: list[tuple[str, dict[str, Any], str]] = [
            ("search_by_words", {"query": ""}, "query"),
            (
                "search_by_words",
                {"query": "red", "filter": {"colour": "red"}},
                "colour",
            ),
            ("search_by_picture", {}, "give either `image`"),
            ("search_by_picture", {"image": "no base64!"}, "image: not base64"),
            ("search_by_picture", {"file": outside}, "there is no file"),
            ("get_item", {"item_id": "nothing"}, "There is no item"),
        ]
        for tool, wrong, message in bad:
            refused = await mcp.call_tool(tool, wrong)
            assert refused.is_error, (tool, wrong)
            assert message in refused.content[0].text, refused.content[0].text
            assert "Traceback" not in refused.content[0].text


@needs("mcp")
@pytest.mark.slow
async def test_mcp_server_tells_of_a_wrong_key_a_rate_and_a_service_that_is_gone(
    url: str, built_index: Path
) -> None:
    from dcar_client.mcp import server
    from mcp import Client as AssistantClient

    async with AssistantClient(server(url, key="wrong")) as mcp:
        refused = await mcp.call_tool("search_by_words", {"query": "red"})
        assert refused.is_error is True
        assert "401" in refused.content[0].text
        refused = await mcp.call_tool("search_by_picture", {"file": "circle/blue.png"})
        assert "without --pictures" in refused.content[0].text
    with serving(built_index, rate_limit="1/day") as (_, port):
        async with AssistantClient(server(f"http://127.0.0.1:{port}")) as mcp:
            answers = [
                await mcp.call_tool("search_by_words", {"query": "red"})
                for _ in range(2)
            ]
            assert [answer.is_error for answer in answers] == [False, True]
            assert "429" in answers[1].content[0].text
    async with AssistantClient(server("http://127.0.0.1:9")) as mcp:
        refused = await mcp.call_tool("search_by_words", {"query": "red"})
        assert "does not answer" in refused.content[0].text


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        ("mcp", "mcp"),
        ("langchain", "langchain_core"),
        ("llama_index", "llama_index.core"),
    ],
)
def test_a_missing_extra_is_named(
    module: str,
    blocked: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, f"dcar_client.{module}", raising=False)
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{blocked}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, blocked, None)
    with pytest.raises(
        ImportError, match=rf"pip install 'dcar-client\[{module.replace('_', '-')}\]'"
    ):
        importlib.import_module(f"dcar_client.{module}")


@needs("langchain")
async def test_langchain_retrieves_captions(url: str, client: Client) -> None:
    from dcar_client.langchain import DcarRetriever

    retriever = DcarRetriever(
        client=client,
        k=3,
        options={"fields": ["color"]},
    )
    expected = client.search_text("a red circle", k=3, fields=["color"]).results
    documents = retriever.invoke("a red circle")
    assert [document.id for document in documents] == [result.id for result in expected]
    first = documents[0]
    result = expected[0]
    assert first.page_content == result.caption
    assert first.metadata["color"] == (result.metadata or {})["color"]
    assert first.metadata["score"] == result.score
    assert first.metadata["image_url"] == result.image_url
    assert not {"width", "height"} & first.metadata.keys(), (
        "an item's own fields may have these names"
    )
    (circle,) = retriever.invoke("a red square", k=1, filter={"category": "circle"})
    assert circle.metadata["category"] == "circle"
    assert await retriever.ainvoke("a red circle") == documents
    async with AsyncClient(url, key=ALICE) as async_client:
        both = DcarRetriever(
            client=client,
            async_client=async_client,
            k=3,
            options={"fields": ["color"]},
        )
        assert await both.ainvoke("a red circle") == documents


@needs("llama-index")
async def test_llama_index_retrieves_captions(
    url: str,
    client: Client,
    gallery: Path,
) -> None:
    from dcar_client.llama_index import DcarRetriever
    from llama_index.core.schema import QueryBundle

    file = gallery / "circle/blue.png"
    retriever = DcarRetriever(client, k=3, options={"fields": ["color"]})
    async with AsyncClient(url, key=ALICE) as async_client:
        both = DcarRetriever(
            client,
            async_client=async_client,
            k=3,
            options={"fields": ["color"]},
        )
        for query, expected in (
            (
                QueryBundle("a red circle"),
                client.search_text("a red circle", k=3, fields=["color"]),
            ),
            (
                QueryBundle("red", image_path=str(file)),
                client.search_image(file, "red", k=3, fields=["color"]),
            ),
        ):
            nodes = retriever.retrieve(query)
            assert [node.node_id for node in nodes] == [
                result.id for result in expected.results
            ]
            assert [node.score for node in nodes] == [
                result.score for result in expected.results
            ]
            assert [node.text for node in nodes] == [
                result.caption for result in expected.results
            ]
            assert (
                nodes[0].metadata["color"]
                == (expected.results[0].metadata or {})["color"]
            )
            assert await retriever.aretrieve(query) == nodes
            assert await both.aretrieve(query) == nodes
    with pytest.raises(ServiceError, match="401"), Client(url, key="wrong") as stranger:
        DcarRetriever(stranger).retrieve("red")
