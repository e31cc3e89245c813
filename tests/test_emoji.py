"""The emoji example: what training may read, its captions and short queries, and the
record of the checkpoints.
"""

import json
import runpy
from itertools import chain
from typing import Any

import pytest

from dcar_core.data import Annotations
from tests.support.paths import ROOT

EMOJI = ROOT / "examples" / "emoji"
DOMAINS = ("twemoji", "openmoji")
QUERIES = {"validation": 303, "test": 357}


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(EMOJI / "evaluate_queries.py"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (EMOJI / "twemoji" / "metadata.jsonl").read_text().splitlines()
    ]


def read(domain: str, split: str) -> list[dict[str, Any]]:
    return list(
        json.loads(
            (EMOJI / domain / f"{split}.json").read_text(encoding="utf-8")
        ).values()
    )


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_share_no_emoji_no_image_and_no_caption(domain: str) -> None:
    lines = [
        json.loads(line)
        for line in (EMOJI / domain / "metadata.jsonl").read_text().splitlines()
    ]
    split_of = {line["file_name"]: line["split"] for line in lines}
    entries = {split: read(domain, split) for split in ("train", "val", "test")}
    categories = {
        split: {each["class_name"] for each in found}
        for split, found in entries.items()
    }
    for split, found in entries.items():
        assert {split_of[each["file_name"]] for each in found} == {split}
    assert len(lines) == 3944
    files = {each["file_name"] for each in chain.from_iterable(entries.values())}
    assert len(files) == {"twemoji": 3925, "openmoji": 3801}[domain], (
        "others are copies"
    )
    assert not categories["train"] & (categories["test"] | categories["val"]), (
        "in any skin tone"
    )
    splits, _ = Annotations(EMOJI / domain).load_all()
    contents = [
        {split.read(image) for image in split.images} for split in splits.values()
    ]
    assert sum(map(len, contents)) == len(frozenset().union(*contents)) > 3500
    for split, unseen in (
        ("train", "val"),
        ("train", "test"),
        ("val", "test"),
    ):
        negatives: set[str] = set()
        for pair in entries[split]:
            negatives.update(pair["negative"])
        captions: set[str] = set()
        for pair in entries[unseen]:
            positive = pair["positive"]
            captions.update([positive] if isinstance(positive, str) else positive)
        assert len(negatives) > 500
        assert not negatives & captions


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_bundled_checkpoint_is_small_and_the_run_that_the_results_name(
    domain: str,
) -> None:
    results = json.loads((EMOJI / "results.json").read_text(encoding="utf-8"))[domain]
    training = json.loads(
        (EMOJI / domain / "checkpoint" / "config.json").read_text(encoding="utf-8")
    )["training"]
    seed = results["bundled_seed"]
    (run,) = (
        run
        for run in results["runs"]
        if run["method"] == "query-prompts" and run["seed"] == seed
    )
    assert training["seed"] == run["seed"]
    assert training["epoch"] == run["epoch"]
    assert training["validation"] == run["val"]
    limits = {"base/open_clip_model": 15e6, f"{domain}/checkpoint/trainables": 1e6}
    assert all(
        (EMOJI / f"{name}.safetensors").stat().st_size < size
        for name, size in limits.items()
    )
    assert (EMOJI / domain / "gallery.tar").stat().st_size < 8e6


@pytest.mark.slow
def test_every_query_has_answers_and_is_in_one_set(
    script: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    texts = []
    for name, count in QUERIES.items():
        queries = script["read_queries"](EMOJI / "queries" / f"{name}.tsv", rows)
        assert len(queries) == count
        assert {query.kind for query in queries} == {
            "word",
            "synonym",
            "description",
            "tone",
            "typo",
        }
        assert all(query.answers for query in queries)
        texts.append({query.text.lower() for query in queries})
    assert not texts[0] & texts[1]


@pytest.mark.parametrize(
    ("answer", "labels", "count"),
    [
        ("🎃", {"jack-o-lantern"}, 1),
        ("%heart", {"red heart", "black heart"}, None),
        ("🧛*", {"vampire", "man vampire", "woman vampire"}, None),
        ("@🚒", {"firefighter", "man firefighter", "woman firefighter"}, None),
        ("👍", {"thumbs up"}, 6),
        ("=👍🏿", {"thumbs up"}, 1),
    ],
)
def test_an_answer_names_one_emoji_in_any_skin_tone_or_several(
    answer: str,
    labels: set[str],
    count: int | None,
    script: dict[str, Any],
    rows: list[dict[str, Any]],
) -> None:
    found = [row["category"] for row in rows if script["answer_test"](answer)(row)]
    assert labels <= {*found}
    assert count is None or len(found) == count
