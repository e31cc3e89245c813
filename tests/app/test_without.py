"""The option `without`: its text is subtracted from every kind of query."""

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from app.cli import app
from app.search.query import Weights
from dcar_core import Encoder
from index_jobs.store.artifact import Artifact
from tests.support.images import png
from tests.support.responses import assert_problem
from tests.support.searches import Client, close, ids, ranked
from tests.support.service import ServiceClient, opened

USUAL = Weights().without


async def test_without_is_subtracted_from_every_kind_of_query(
    started: ServiceClient, encoder: Encoder, artifact: Artifact
) -> None:
    circle, red = encoder.encode_text(["a circle"])[0], encoder.encode_text(["red"])[0]
    image = encoder.encode_images([png()])[0]
    row = artifact.row_of("circle/red.png")
    assert row is not None
    item = artifact.vectors(np.array([row]))[0]

    client = Client(started)
    plain = await client.text(query="a circle", k=24)
    close(plain, ranked(artifact, circle))
    found = await client.text(query="a circle", without="  red ", k=24)
    close(found, ranked(artifact, circle - USUAL * red))
    assert ids(found) != ids(plain)
    strong = await client.text(query="a circle", without="red", weights={"without": 0.8}, k=24)
    close(strong, ranked(artifact, circle - 0.8 * red))
    tiny = {"text": 5e-324, "without": 5e-324}  # only the ratio matters
    ratio = await client.text(query="a circle", without="red", weights=tiny, k=24)
    close(ratio, ranked(artifact, circle - red))
    same = await client.text(query="a circle", without="red", weights={"without": 0}, k=24)
    assert ids(same) == ids(plain)
    both = await client.image(png(), query="a circle", without="red", k="24")
    close(both, ranked(artifact, image + circle - USUAL * red))
    like = await client.text(more_like=["circle/red.png"], without="red", k=24)
    close(like, [each for each in ranked(artifact, item - USUAL * red) if each[0] != "circle/red.png"])


async def test_without_texts_are_cached_separately(built_index: Path) -> None:
    async with opened(built_index) as http:
        client = Client(http)
        await client.text(query="a circle")
        half = await client.text(query="a circle", without="red")
        assert not half["cached"], "one of its two texts was new"
        assert (await client.text(query="a circle", without="red", k=3))["cached"]
        batch = await http.post(
            "/search/batch", json={"queries": [{"query": "a circle"}, {"query": "a circle", "without": "red"}]}
        )
        plain, without = batch.json()["answers"]
        assert ids(without) == ids(half) != ids(plain)


async def test_form_field_without_is_text_and_checked(built_index: Path) -> None:
    async with opened(built_index, max_query_chars=20) as http:
        for given, status in ((" ", 422), ("7", 200)):
            answer = await http.post("/search/image", files={"file": png()}, data={"without": given})
            assert answer.status_code == status
        longest = {"query": "\U0001f534" * 20, "without": "\U0001f534" * 20}
        assert (await http.post("/search/text", json=longest)).status_code == 200
        assert_problem(await http.post("/search/text", json=longest | {"without": "r" * 21}), 422, "without")


def test_the_command_line_subtracts_without_too(built_index: Path, encoder: Encoder, artifact: Artifact) -> None:
    texts = encoder.encode_text(["a circle", "red"])
    expected = [each for each, _ in ranked(artifact, texts[0] - USUAL * texts[1])]
    asked = ["search", "a circle", "--index", str(built_index), "--without", "red", "-k", "24", "--json"]
    found = json.loads(CliRunner().invoke(app, asked).stdout)
    assert ids(found) == expected
    assert np.isclose(found["results"][0]["score"], ranked(artifact, texts[0] - USUAL * texts[1])[0][1], atol=1e-3)
