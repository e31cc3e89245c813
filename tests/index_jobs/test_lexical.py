"""The lexical index: analysis, scores, updates, and what it writes."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dcar_core.util.errors import ArtifactError
from index_jobs.index.lexical import (
    LexicalIndex,
    index_terms,
    query_terms,
    write_lexical,
)
from index_jobs.index.versions import open_current
from index_jobs.jobs.update import add
from tests.support.commands import run
from tests.support.galleries import write_images
from tests.support.versions import Build

TEXTS = [
    "ghost: a white spook",
    "skull",
    "fish cake",
    "a red car",
    "red truck, fire engine",
    "WX-300 left mirror",
]


@pytest.fixture(scope="module")
def lexical(tmp_path_factory: pytest.TempPathFactory) -> LexicalIndex:
    path = tmp_path_factory.mktemp("lexical") / "lexical"
    write_lexical(path, TEXTS)
    return LexicalIndex(path)


def test_terms_of_texts_and_queries() -> None:
    for one, other in (
        ("Éclair", "eclair"),
        ("WX-300", "wx300"),
        ("WX 300", "wx-300"),
        ("flamingos", "flamingo"),
        ("boxes", "box"),
        ("berries", "berry"),
        ("\uff46\uff55\uff4c\uff4c", "full"),
        ("東京タワー", "東京"),
        ("كِتَابٌ", "كتاب"),
        ("סֵפֶר", "ספר"),
    ):
        assert {*index_terms(one)} & {*index_terms(other)}, (
            "spellings of one thing share a term"
        )
    for word in ("हिन्दी", "किताब", "বাংলা", "தமிழ்", "မြန်မာ", "ที่", "ދިވެހި"):
        assert index_terms(f"a {word}, {word}-7.") == [
            "a",
            word,
            word,
            "7",
            f"{word}7",
        ], "vowel signs belong to it"
    for text, terms in (
        ("\u2764\ufe0f heart", ["heart"]),
        ("1\ufe0f\u20e3", ["1"]),
        ("ि", []),
    ):
        assert index_terms(text) == terms, "a mark without a letter is no term"
    assert index_terms("Éclair \u00e9\u0301cole " * 50) == ["eclair", "ecole"] * 50, (
        "no text is cut within a word"
    )
    for text, query in (
        ("a photo of the ghost", "photo ghost"),
        ("to be or not", "be not"),
        ("the of", "the of"),
    ):
        assert query_terms(text, lambda _: True) == query.split()


def test_a_code_is_known_by_its_parts(tmp_path: Path) -> None:
    write_lexical(
        tmp_path / "lexical", [f"IMG_{n:04}.jpg\nIMG {n:04}" for n in range(12)]
    )
    opened = LexicalIndex(tmp_path / "lexical")
    for query in ("IMG_0010", "img0010", "IMG 0010"):
        scores, rows = opened.search(query, 2)
        assert rows[0] == 10
        assert scores[0] > 0.9
        assert scores[1] < 0.2
        assert opened.known_share(query) == 1
    assert opened.known_share("IMG_0099") == 1 / 3
    assert query_terms("IMG_0099", {"img"}.__contains__) == ["img", "0099", "img0099"]


@pytest.mark.parametrize(
    ("query", "row"),
    [
        ("ghost", 0),
        ("gohst", 0),
        ("wx 300", 5),
        ("WX300", 5),
        ("fire truck", 4),
        ("red car", 3),
        ("fish cakes", 2),
    ],
)
def test_the_best_row_contains_most_of_the_query(
    lexical: LexicalIndex,
    query: str,
    row: int,
) -> None:
    assert lexical.search(query, 1)[1].tolist() == [row]


def test_scores_and_the_known_share_are_shares_of_the_query(
    lexical: LexicalIndex,
) -> None:
    whole, half = lexical.search("red car", 2)[0]
    assert 0 < half < whole < 1.7
    # an unknown word is a part that is missing
    assert lexical.search("red zebra", 1)[0] < lexical.search("red", 1)[0]
    assert lexical.search("gohst", 1)[0] < lexical.search("ghost", 1)[0]
    for text, share in {
        "ghost": 1,
        "the ghosts": 1,
        "gohst": 0,
        "red zebra": 0.5,
        "?!": 1,
    }.items():
        assert lexical.known_share(text) == share
    for query in ("zzz", "", "?!"):
        assert [len(part) for part in lexical.search(query, 3)] == [0, 0]


def test_scores_of_chosen_rows_equal_those_of_a_search(tmp_path: Path) -> None:
    generator = random.Random(0)
    words = [
        first + second + third
        for first in "bdfgkl"
        for second in ("ab", "oc", "ip")
        for third in ("em", "un", "at")
    ]
    texts = [
        " ".join(generator.choices(words, k=generator.choice((1, 3, 9, 30, 80))))
        for _ in range(1200)
    ]
    write_lexical(tmp_path / "lexical", [*texts, "", " ".join(map(str, range(1000)))])
    lexical = LexicalIndex(tmp_path / "lexical")
    for query in (
        "babem",
        "babem docun",
        "babem 7 unknown",
        "babem gokatt",
        " ".join(words),
        "of",
        "?!",
    ):
        scores, rows = lexical.search(query, 2000)
        expected = np.zeros(1202)
        expected[rows] = scores
        assert (
            np.count_nonzero(expected)
            == len(rows)
            <= lexical.count_matches(query)
            <= 1202
        )
        for count in (0, 1, 300, 1202):
            chosen = np.array(generator.sample(range(1202), count), np.int64)
            np.testing.assert_allclose(
                lexical.score(query, chosen),
                expected[chosen],
                rtol=1e-5,
            )


@pytest.mark.parametrize(
    "damage", [lambda path: (path / "meta.json").write_text("{}"), shutil.rmtree]
)
def test_a_missing_or_damaged_index_is_an_error_with_its_path(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "lexical"
    write_lexical(path, TEXTS)
    damage(path)
    with pytest.raises(ArtifactError, match=f"{path} cannot be read"):
        LexicalIndex(path)


@pytest.mark.parametrize("first", [0, 200, 285, 300])
def test_only_allowed_rows_are_found(tmp_path: Path, first: int) -> None:
    """Few of them are looked up one by one."""
    write_lexical(
        tmp_path / "lexical",
        [f"face {'ghost' if row % 3 == 0 else 'cat'}" for row in range(300)],
    )
    lexical = LexicalIndex(tmp_path / "lexical")
    ghosts = {*range(first + -first % 3, 300, 3)}
    allowed = np.arange(300) >= first
    for k in (7, 100):
        scores, rows = lexical.search("ghost", k, allowed)
        assert (
            len({*rows.tolist()} & ghosts)
            == len(rows)
            == len(scores)
            == min(k, len(ghosts))
        )


def test_full_disk_is_an_os_error_from_the_first_file_on(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from index_jobs.index.lexical import write_lexical; "
        "write_lexical(pathlib.Path(sys.argv[1]), ['a'])"
    )
    done = run("-c", code, tmp_path / "lexical", file_size=0)
    assert (
        f"OSError: the lexical index {tmp_path / 'lexical'} cannot be written"
        in done.stderr
    )


def test_chosen_metadata_fields_are_looked_up(build: Build, tmp_path: Path) -> None:
    index = tmp_path / "index"
    for name, color, code in (("gallery", "red", "WX-300"), ("more", "blue", "QZ-17")):
        write_images(
            tmp_path / name,
            color,
            caption=f"a {color} mirror",
            code=code,
            note="velvet",
        )

    def found(*words: str) -> list[int]:
        lexical = open_current(index).lexical
        assert lexical is not None
        return [len(lexical.search(word, 9)[1]) for word in words]

    build(tmp_path / "gallery", text_fields=["code", "brand"], group_field="code")
    assert found("wx300", "mirror", "velvet") == [1, 1, 0]
    assert open_current(index).manifest.spec.group_field == "code"
    add(index, tmp_path / "more", progress=False)
    assert found("qz17", "mirror", "velvet") == [1, 2, 0]
    build(tmp_path / "gallery", max_vanished=1)
    assert found("wx300", "mirror", "velvet") == [1, 1, 1]


def test_an_index_that_cannot_be_written_is_read(published: Path) -> None:
    before = sorted(published.rglob("*"))
    folders = (published, published / "blobs")
    for mode in (0o555, 0o755):
        for folder in folders:
            folder.chmod(mode)
        assert len(open_current(published).lexical or ()) == 24
    assert sorted(published.rglob("*")) == before, "no lock files"
