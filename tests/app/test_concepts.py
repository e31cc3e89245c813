"""Names that are taught by examples: as words, filters, facets and tags, and for how
long.
"""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from app.search import Index
from app.search.concepts import Concepts
from app.search.errors import InvalidQueryError
from app.search.query import Query, make_plan
from dcar_core import Encoder
from index_jobs.engines.faiss.index import FaissIndex
from index_jobs.index.index_version import IndexVersion, Part
from index_jobs.index.versions import open_current
from index_jobs.jobs.update import remove
from index_jobs.rebuild import rebuild
from tests.support.responses import assert_problem
from tests.support.service import ServiceClient, opened, until
from tests.support.writes import ADMINS, WRITES, ended

RED = ["circle/red.png", "square/red.png", "triangle/red.png"]
NOT = ["circle/orange.png"]


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


async def taught(client: ServiceClient, name: str = "rex", **body: Any) -> Any:
    response = await client.put(
        f"/concepts/{name}",
        json={"ids": RED, **body},
        headers=ADMINS,
    )
    return response.raise_for_status().json()


async def search(client: ServiceClient, **body: Any) -> Any:
    response = await client.post("/search/text", json={"k": 24, **body})
    return response.raise_for_status().json()


async def test_a_name_is_a_word_a_filter_a_facet_and_a_tag(
    index: Path, encoder: Encoder
) -> None:
    version = open_current(index)
    vectors = version.vectors(np.arange(version.rows)).astype(np.float64)
    async with opened(index, **WRITES) as client:

        async def check(direction: Any, **body: Any) -> Any:
            answer = await search(client, **body)
            scores = [result["score"] for result in answer["results"]]
            assert scores == pytest.approx(
                sorted(vectors @ unit(direction), reverse=True), abs=1e-5
            ), body
            return answer

        text, words, dropped, red = encoder.encode_text(
            ["@rex", "a green dog, outside", "tears", "red"]
        )
        await check(text, query="@rex")  # a text before a name is taught
        concept = await taught(client, not_ids=NOT, kind=" green  dog ")
        assert concept == concept | {
            "name": "rex",
            "kind": "green dog",
            "ids": RED,
            "not_ids": NOT,
            "examples": 3,
        }
        rows = {version.item(row).id: row for row in range(version.rows)}
        covariance = np.cov(vectors.T, bias=True)
        size = vectors.shape[1]
        spread = covariance + 3 * (
            1 + 10 * size / 24
        ) * covariance.diagonal().mean() * np.eye(size)
        rex = unit(
            np.linalg.solve(
                spread, vectors[[rows[item] for item in RED]].mean(0) - vectors.mean(0)
            )
        )
        # the red ones are less like each other than they are like NOT
        scores = vectors @ rex
        members = {*RED}
        middle = np.median(scores)
        stranger = rows[NOT[0]]
        cutoff = max(
            np.sort(scores)[-3],
            middle + 0.45 * (1 - middle),
            scores[stranger],
        )
        assert scores[stranger] < concept["cutoff"] == pytest.approx(cutoff, abs=2e-6)
        assert concept["members"] == len(members)

        alone = await check(
            rex,
            query="@rex",
            hybrid=True,
            fields=["concept"],
            facets=["concept"],
        )
        assert alone["cutoff"] == concept["cutoff"]
        assert {
            result["id"]
            for result in alone["results"]
            if result["metadata"] == {"concept": ["rex"]}
        } == members
        assert alone["facets"]["concept"] == [{"value": "rex", "count": len(members)}]
        for condition, count in (
            ("rex", len(members)),
            (["rex"], len(members)),
            ({"not": "rex"}, 24 - len(members)),
        ):
            assert (
                len(
                    (await search(client, query="red", filter={"concept": condition}))[
                        "results"
                    ]
                )
                == count
            )
        await check(
            words + 0.7 * rex - 0.5 * dropped,
            query="a  @rex,\toutside",
            without="tears",
        )
        await check(red - 0.5 * rex, query="red", without="@rex")
        served = client.app.state.collections[None].current
        settings = client.app.state.settings
        assert (
            make_plan(served, Query(query="a @rex", hybrid=0.5), settings).words_weight
            == 0.2
        )
        for text in ("mail@x", "@ x", "@!", f"@{'y' * 65}"):
            assert (await search(client, query=text))["results"]

        response = await client.get("/concepts/rex")
        assert response.json() == concept
        response = await client.get("/concepts")
        assert response.json() == {"concepts": [concept]}
        again = await taught(client, ids=RED[:1])
        assert again["examples"] == 1
        assert again["kind"] == ""
        assert again["not_ids"] == []
        response = await client.delete("/concepts/rex", headers=ADMINS)
        assert response.status_code == 204
        assert_problem(
            await client.delete("/concepts/rex", headers=ADMINS),
            404,
            "name",
        )
        assert_problem(await client.get("/concepts/rex"), 404, "name")


async def test_faults_name_the_field(index: Path) -> None:
    async with opened(index, **WRITES) as client:
        await taught(client, "Éloïse-2")
        # with marks, which are no letters
        await taught(client, "\u0930\u0947\u0915\u094d\u0938")
        for name, body, field in (
            ("a b", {"ids": RED}, "name"),
            ("a.b", {"ids": RED}, "name"),
            ("x" * 65, {"ids": RED}, "name"),
            ("rex", {"ids": []}, "ids"),
            ("rex", {"ids": ["x"] * 201}, "ids"),
            ("rex", {"ids": ["nowhere"]}, "ids"),
            ("rex", {"ids": RED, "not_ids": RED[:1]}, "not_ids"),
            ("rex", {"ids": RED, "not_ids": ["?"]}, "not_ids"),
            ("rex", {"ids": RED, "kind": "x" * 65}, "kind"),
            ("rex", {"ids": [1]}, "ids.0"),
            ("rex", {}, "ids"),
        ):
            assert_problem(
                await client.put(f"/concepts/{name}", json=body, headers=ADMINS),
                422,
                field,
            )
        problem = assert_problem(
            await client.post("/search/text", json={"query": "my @Elois"}),
            422,
            "query",
        )
        assert "@Éloïse-2" in problem["detail"]
        for field, query in (
            ("without", {"query": "red", "without": "@nobody"}),
            ("rerank", {"query": "@Éloïse-2", "rerank": True}),
            ("min_score", {"query": "@Éloïse-2 there", "min_score": "auto"}),
        ):
            assert_problem(await client.post("/search/text", json=query), 422, field)
        with pytest.raises(InvalidQueryError, match="kind: at most 64"):
            Index.open(index, device="cpu").teach("rex", RED, kind="x" * 65)
        batch = {"queries": [{"query": "red"}, {"query": "@nobody"}]}
        assert_problem(
            await client.post("/search/batch", json=batch),
            422,
            "queries.1.query",
        )


async def test_names_outlast_changes_of_items_rebuilds_and_other_processes(
    index: Path,
    gallery: Path,
    tiny_checkpoint: Path,
    in_process: list[int],
) -> None:
    async with opened(index, poll_s=0.05, **WRITES) as client:
        Index.open(index, device="cpu").teach("rex", RED)  # as another process does
        await until(
            lambda: client.app.state.collections[None].current.concepts.revision != 0
        )

        async def knows(**expected: Any) -> None:
            async def is_so() -> bool:
                return (
                    expected.items()
                    <= (await client.get("/concepts/rex")).json().items()
                )

            await until(is_so)

        first = (await search(client, query="@rex", k=1))["results"][0]["id"]
        remove(index, RED[:2])
        await knows(examples=1, ids=RED)
        await asyncio.to_thread(
            rebuild,
            gallery,
            tiny_checkpoint,
            index,
            workers=0,
            progress=False,
            force=True,
        )
        await knows(examples=3, ids=RED)
        assert (await search(client, query="@rex", k=1))["results"][0]["id"] == first
        body = {"filter": {"concept": "rex"}}
        await ended(
            client, await client.request("DELETE", "/items", json=body, headers=ADMINS)
        )
        await knows(examples=0, members=0)
        problem = assert_problem(
            await client.post("/search/text", json={"query": "@rex red"}),
            422,
            "query",
        )
        assert "teach it again" in problem["detail"]


def test_members_are_those_of_a_comparison_with_all(index: Path) -> None:
    # two of 1,200 items, and one of 200
    base = open_current(index)
    kinds = np.arange(2592) % 13 // 6
    noise = 0.03 * np.random.default_rng(0).normal(size=(2592, 16))
    vectors = unit(np.eye(16)[kinds] + noise).astype(np.float32)
    parts = list[Part]()
    # the same items again and again; an id means the last one
    for start in range(0, 2592, 24):
        (flat := faiss.IndexFlatIP(16)).add(vectors[start : start + 24])
        parts.append(
            base.parts[0]._replace(
                rows=range(start, start + 24), vectors=FaissIndex(flat)
            )
        )
    version = IndexVersion(index, replace(base.manifest, dim=16), parts)
    concepts = Concepts(version, version.vectors)
    centred = vectors - vectors.mean(0)
    covariance = np.cov(vectors.T, bias=True)
    lower = np.linalg.cholesky(
        covariance + 0.3 * covariance.diagonal().mean() * np.eye(16)
    )
    white = unit(np.linalg.solve(lower, centred.T).T)
    for kind in range(3):
        rows = np.flatnonzero(kinds[2568:] == kind)[:3] + 2568
        is_member = white @ unit(white[rows].mean(0)) >= 0.69 + 0.1 / 3
        assert (
            concepts.teach("some", [version.item(row).id for row in rows])["members"]
            == is_member.sum()
        )
    assert [
        bool(names) for names in version.column("concept").to_pylist()
    ] == is_member.tolist()
