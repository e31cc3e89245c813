"""Files with random damage are read, or refused with the error for bad input."""

import io
import json
import random
import tarfile
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dcar_core.data import Annotations
from dcar_core.util.errors import DcarError

ROWS = [
    {"path": "a.png", "caption": "a cat", "captions": ["x", "y"], "category": "cat", "price": 9.5, "tags": ["new"]},
    {"path": "b.png", "caption": "a dog", "captions": ["z"], "category": "dog", "price": 1.0, "tags": []},
]
FDRD = {
    "a": {"file_name": "a", "file_path": "/x/a.jpg", "positive": "A cat.", "negative": ["A dog."], "class_name": "cat"}
}
PIECES = [b"\xef\xbb\xbf", b"\xed\xa0\x80", b"1e999", b"NaN", b"9" * 40, b"null", b"\r", b"[[[[", b'{"a":' * 5]


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, content in (("1.jpg", b"x" * 100), ("1.json", json.dumps(ROWS[0]).encode()), ("1.txt", b"hi\nho")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return out.getvalue()


def damage(content: bytes, choose: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(choose.randint(1, 5)):
        place = choose.randrange(len(data) + 1)
        end = place + choose.randint(1, 64)
        kind = choose.randrange(4)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del data[place:end]
        elif kind == 2:
            data[place:place] = data[place:end] * choose.choice([1, 50])
        else:
            data[place:place] = choose.choice(PIECES)
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.jsonl", "\n".join(map(json.dumps, ROWS)).encode()),
        ("pairs.csv", b'path,caption,category,price,tags\na.png,"a, cat",cat,9.5,"[""new""]"\nb.png,dog,dog,1,\n'),
        ("pairs.tar", tar()),
        ("train.json", json.dumps(FDRD).encode()),
    ],
)
def test_damaged_annotations_are_read_or_refused(name: str, content: bytes, tmp_path: Path) -> None:
    choose = random.Random(0)
    for _ in range(150):
        (tmp_path / name).write_bytes(damage(content, choose))
        with suppress(DcarError):
            Annotations(tmp_path / name).load("train", "ignore")


@pytest.mark.slow
def test_parquet_with_damaged_metadata_of_a_column_is_refused_without_an_abort(tmp_path: Path) -> None:
    content, file = parquet(), tmp_path / "pairs.parquet"
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for place in range(start + 36, start + 126, 18):  # the sizes of a column, among others
        damaged = bytearray(content)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with suppress(DcarError):
            Annotations(file).load("train", "ignore")
    assert place < len(content) - 8
