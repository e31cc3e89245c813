"""Pairs of a query and a result: re-ranking by the second stage, and measured explanations."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dcar_core import Encoder
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import save_checkpoint
from dcar_core.model.dcar import DCAR, SecondStage, take
from dcar_core.model.methods import find_method
from index_jobs.rebuild import rebuild
from tests.support.responses import assert_problem
from tests.support.searches import Client, ids
from tests.support.service import opened


async def test_reranking_adds_the_score_of_the_second_stage_to_the_cosine(
    reranking_index: Path, reranking_checkpoint: Path
) -> None:
    model = Encoder.load(reranking_checkpoint, device="cpu").model
    stage = SecondStage(model)
    texts = take(stage.texts(model.backbone.tokenize(["a red square"])), torch.zeros(8, dtype=torch.long))
    async with opened(reranking_index, rerank_depth=8) as http:
        client, snapshot = Client(http), http.app.state.collections[None].live
        plain = await client.text(query="a red square", k=24)
        again = await client.text(query="a red square", k=24, rerank=True)
        assert sorted(ids(again)[:8]) == sorted(ids(plain)[:8])
        assert ids(again)[8:] == ids(plain)[8:]
        rows = [snapshot.artifact.row_of(each) for each in ids(again)[:8]]
        pixels = np.stack([snapshot.encoder.preprocess(snapshot.artifact.image_bytes(row)) for row in rows])
        images = stage.images(stage.image_rows(model.backbone.normalized(pixels)))
        expected = [r["score"] for r in again["results"][:8]] + stage.scores(texts, images).numpy()
        rescored = [r["rerank_score"] for r in again["results"][:8]]
        np.testing.assert_allclose(rescored, expected, atol=2e-3)
        assert rescored == sorted(rescored, reverse=True)
        assert all("rerank_score" not in r for r in again["results"][8:])
        assert {r["id"]: r["score"] for r in again["results"]} == {r["id"]: r["score"] for r in plain["results"]}
        pages = [ids(await client.text(query="a red square", k=4, offset=o, rerank=True)) for o in (0, 4, 8)]
        assert [each for page in pages for each in page] == ids(again)[:12]
        for offset in (0, 12):
            body = {"more_like": ["circle/red.png"], "rerank": True, "offset": offset}
            assert_problem(await http.post("/search/text", json=body), 422, "rerank")


@pytest.mark.parametrize("method_name", ["dcar", "dcar+", "block-adapters+", "query-prompts"])
async def test_a_model_without_a_second_stage_does_not_rerank(
    method_name: str, tmp_path: Path, gallery: Path, tiny_model: Path
) -> None:
    """Nor does one whose second stage validation turned off."""
    model = DCAR(load_backbone(BackboneSource(str(tiny_model))), find_method(method_name).config)
    model.rerank_weight = 0
    save_checkpoint(model, tmp_path / "checkpoint")
    rebuild(gallery, tmp_path / "checkpoint", tmp_path / "index", workers=0, progress=False)
    async with opened(tmp_path / "index") as http:
        body = {"query": "red", "rerank": True}
        detail = assert_problem(await http.post("/search/text", json=body), 409, "rerank")["detail"]
        assert detail.startswith("This model cannot re-rank: it has no second stage, or validation turned it off. ")
        assert "train a model with `dcar train --method query-prompts`" in detail
        explained = (await http.post("/search/text", json={"query": "red", "explain": True, "k": 1})).json()
        assert "words" not in explained["results"][0]["explanation"], "a single word cannot be left out"


@pytest.mark.slow
async def test_reranking_without_images_is_refused(tmp_path: Path, gallery: Path, reranking_checkpoint: Path) -> None:
    changing = Path(shutil.copytree(gallery, tmp_path / "gallery"))
    rebuild(changing, reranking_checkpoint, tmp_path / "index", workers=0, progress=False)
    body = {"query": "red", "rerank": True, "k": 24}
    (changing / "circle/red.png").unlink()
    async with opened(tmp_path / "index", rerank_depth=24) as http:
        results = (await http.post("/search/text", json=body | {"explain": True})).json()["results"]
        assert ["rerank_score" in result for result in results] == [True] * 23 + [False]
        assert results[-1]["caption"] == "a red circle"
        alone = {"query": "red", "filter": {"caption": ["a red circle", "a blue circle"]}, "explain": True}
        results = (await http.post("/search/text", json=alone)).json()["results"]
        assert {r["caption"]: "explanation" in r for r in results} == {"a red circle": False, "a blue circle": True}
        shutil.copy(gallery / "circle/red.png", changing / "circle/red.png")
        for asked, field in ((body | {"explain": True}, "rerank_score"), (alone, "explanation")):
            results = (await http.post("/search/text", json=asked)).json()["results"]
            assert all(field in result for result in results[:2]), "a missing image is looked for again"
        assert len(results) == 2
        shutil.rmtree(changing)
        assert "none of them" in assert_problem(await http.post("/search/text", json=alone | {"k": 3}), 409)["detail"]
    async with opened(tmp_path / "index") as http:
        assert "none of them" in assert_problem(await http.post("/search/text", json=body), 409)["detail"]
        assert (await http.post("/search/text", json=body | {"rerank": False})).status_code == 200


async def test_explanations_match_measured_falls_of_the_score(
    built_index: Path, gallery: Path, encoder: Encoder
) -> None:
    async with opened(built_index, explain_results=2) as http:
        client = Client(http)
        body = await client.text(query="a red square", k=4, explain=True)
        assert ["explanation" in result for result in body["results"]] == [True, True, False, False]
        first = body["results"][0]
        relevance = np.array(first["explanation"]["relevance"])
        assert relevance.shape == (4, 4), "32 pixels, patches of 8"
        assert first["explanation"]["fit"] == "fill", "this model squeezes images into its square"

        item = (await http.get(f"/items/{first['id'].replace('/', '%2F')}")).json()
        pixels = encoder.preprocess(gallery / item["metadata"]["file_name"])
        hidden = pixels.copy()
        hidden[:, 8:16, 24:32] = 255
        whole, without = encoder.encode_pixels(np.stack([pixels, hidden]))
        text = encoder.encode_text(["a red square"])[0]
        np.testing.assert_allclose(relevance[1, 3], text @ whole - text @ without, atol=1e-3)
        shorter = encoder.encode_text(["red square", "a square", "a red"])
        words = first["explanation"]["words"]
        assert [each["word"] for each in words] == ["a", "red", "square"]
        np.testing.assert_allclose([each["effect"] for each in words], text @ whole - shorter @ whole, atol=2e-3)
        by_image = await client.image((gallery / "circle/blue.png").read_bytes(), k="1", explain="true")
        assert "words" not in by_image
        assert by_image["results"][0]["explanation"].keys() == {"relevance", "fit"}
        assert np.ptp(by_image["results"][0]["explanation"]["relevance"]) > 0.001
