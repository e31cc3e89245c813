"""Damaged files of every kind are read, or refused with a `DcarError`: those that once
were not, and new ones.

`MUTATE_S=300 make test ARGS="-k damaged"` looks for more, for five minutes a kind. What
it finds belongs into tests/corpus/KIND/FILE/CASE once it is mended.
"""

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dcar_core.data import Annotations
from dcar_core.images.workers import DecodeWorker, Limits
from dcar_core.model.backbone import BackboneSource, load_backbone
from dcar_core.model.checkpoint import load_checkpoint, save_zero_shot
from dcar_core.model.preprocess import Preprocess
from dcar_core.util.errors import DcarError
from dcar_core.util.files import hash_json
from index_jobs.gallery.scan import scan
from index_jobs.index.manifest import FileInfo, Manifest
from index_jobs.spec import IndexSpec
from tests.support.files import write_json, write_rows, write_tar
from tests.support.images import encoded
from tests.support.paths import ROOT
from tests.support.tiny_models import write_tiny_model

EACH = 10
SECONDS = float(os.environ.get("MUTATE_S", "0"))
SEED = int(os.environ.get("MUTATE_SEED", "0"))
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of libraries, about what is damaged
    pytest.mark.timeout(120 + SECONDS),
]
CORPUS = {
    "/".join(path.parts[-3:]): path
    for path in sorted((ROOT / "tests" / "corpus").glob("*/*/*"))
}
LARGEST = 2**16  # bytes of a file that is damaged
KINDS = (
    "annotations",
    "galleries",
    "images",
    "models",
    "tokenizers",
    "checkpoints",
    "manifests",
)
ROWS: list[dict[str, Any]] = [
    {
        "path": "a.png",
        "caption": "a cat",
        "captions": ["x", "y"],
        "category": "cat",
        "price": 9.5,
        "tags": ["new"],
    },
    {
        "path": "b.png",
        "caption": "a dog",
        "captions": ["z"],
        "category": "dog",
        "price": 1.0,
        "tags": [],
    },
]
FDRD = {
    "a": {
        "file_name": "a",
        "file_path": "/x/a.jpg",
        "positive": "A cat.",
        "negative": ["A dog."],
        "class_name": "cat",
    }
}
PIECES = [
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"1e999",
    b"NaN",
    b"9" * 40,
    b"null",
    b"\r",
    b"[[[[",
    b'{"a":' * 5,
    b"\0",
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    2**70,
    1e308,
    "",
    "x" * 300,
    "\ud800",
    [],
    {},
    [[]],
    {"": None},
    "../../x",
    "http://x/y",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid files of every kind, in a folder each."""
    folder = tmp_path_factory.mktemp("valid")
    for kind in KINDS:
        (folder / kind).mkdir()
    flat = [
        {name: value for name, value in row.items() if name != "captions"}
        for row in ROWS
    ]
    for kind in ("annotations", "galleries"):
        write_rows(folder / kind / "pairs.jsonl", ROWS)
        write_rows(folder / kind / "pairs.parquet", ROWS)
        write_rows(
            folder / kind / "pairs.csv",
            [row | {"tags": json.dumps(row["tags"])} for row in flat],
        )
        members = {
            "1.jpg": b"x" * 100,
            "1.json": json.dumps(ROWS[0]).encode(),
            "1.txt": b"hi\nho",
        }
        write_tar(folder / kind / "pairs.tar", members)
    write_json(folder / "annotations" / "train.json", FDRD)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "TIFF", "BMP"):
        (folder / "images" / kind.lower()).write_bytes(
            encoded(Image.effect_noise((48, 40), 90), kind)
        )
    for kind, model in (("models", "ViT-B-32"), ("tokenizers", "ViT-L-14-CLIPA")):
        for file in write_tiny_model(model, folder / kind / "model").iterdir():
            file.rename(folder / kind / file.name)
    base = write_tiny_model("ViT-B-32", folder / "checkpoints" / "base")
    save_zero_shot(BackboneSource(str(base)), folder / "checkpoints")
    spec = IndexSpec(gallery="g", gallery_signature="s", fingerprint="f")
    manifest = Manifest(
        spec=spec,
        dim=4,
        files={"a": FileInfo(1, "0" * 64)},
    )
    (folder / "manifests" / "1.json").write_bytes(manifest.to_bytes())
    return folder


@pytest.fixture(scope="module")
def worker() -> Iterator[DecodeWorker]:
    worker = DecodeWorker()
    yield worker
    worker.close()


def read(kind: str, path: Path, worker: DecodeWorker) -> None:
    if kind == "annotations":
        Annotations(path).load("train", "ignore")
    elif kind == "galleries":
        scan(path)
    elif kind == "images":
        decoder = Preprocess(32, (0.5,) * 3, (0.5,) * 3).fast().decoder()
        worker.run(
            decoder,
            path.read_bytes(),
            Limits(64 * 2**20, seconds=0.5, seconds_per_pixel=0.0),
        )
    elif kind in ("models", "tokenizers"):
        load_backbone(BackboneSource(str(path.parent))).tokenize(
            ["a red cat", "x" * 40]
        )
    elif kind == "checkpoints":
        load_checkpoint(path.parent)
    else:
        Manifest.parse(with_checksum(path.read_bytes()), path.name)


def with_checksum(manifest: bytes) -> bytes:
    """Return a manifest with the checksum of what it says, as its author would write
    it.
    """
    try:
        values = json.loads(manifest)
        values.pop("checksum", None)
        return json.dumps(values | {"checksum": hash_json(values)}).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        return manifest


def check(data: bytes, path: Path, worker: DecodeWorker) -> None:
    """Let the reader of a folder's kind read a file with this content among valid
    files.
    """
    whole = path.read_bytes()
    path.unlink()  # a mapped file is never written into
    path.write_bytes(data)
    try:
        read(path.parent.name, path, worker)
    except DcarError:
        pass
    except BaseException as error:
        kept = path.parents[1] / "kept"
        kept.write_bytes(data)
        error.add_note(f"by {kept} as {path.parent.name}/{path.name}")
        raise
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(whole)


def damaged(data: bytes, choose: random.Random) -> bytes:
    """Return bytes with a few changes: of bits and pieces, or of values if they are
    JSON.
    """
    try:
        if choose.random() < 0.5:
            return changed_json(data, choose)
        return changed_bytes(data, choose)
    except (ValueError, RecursionError):
        return changed_bytes(data, choose)


def changed_bytes(data: bytes, choose: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(choose.randint(1, 5)):
        start = choose.randrange(len(changed) + 1)
        end = start + choose.randint(1, 64)
        kind = choose.randrange(4)
        if kind == 0 and start < len(changed):
            changed[start] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del changed[start:end]
        elif kind == 2:
            changed[start:start] = changed[start:end] * choose.choice([1, 50])
        else:
            changed[start:start] = choose.choice(PIECES)
    return bytes(changed)


def changed_json(data: bytes, choose: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(choose.randint(1, 3)):
        inner: Any = value
        while isinstance(inner, dict | list) and inner:
            if isinstance(inner, dict):
                key = choose.choice([*inner])
            else:
                key = choose.randrange(len(inner))
            if choose.random() < 0.3 or not isinstance(inner[key], dict | list):
                inner[key] = choose.choice(VALUES)
                break
            inner = inner[key]
    return json.dumps(value).encode()


@pytest.mark.parametrize("case", CORPUS)
def test_what_once_got_through_is_refused(
    case: str,
    folder: Path,
    worker: DecodeWorker,
) -> None:
    data = CORPUS[case].read_bytes()
    assert len(data) < 2**14
    check(data, folder / Path(case).parent, worker)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(
    kind: str,
    folder: Path,
    worker: DecodeWorker,
) -> None:
    choose = random.Random(SEED)
    end = time.monotonic() + SECONDS
    number = 0
    files = [
        path
        for path in sorted((folder / kind).iterdir())
        if path.is_file() and path.stat().st_size <= LARGEST
    ]
    sources = [(path.read_bytes(), path) for path in files]
    if SECONDS:
        cases = [case for case in CORPUS if case.startswith(f"{kind}/")]
        sources += [
            (CORPUS[case].read_bytes(), folder / Path(case).parent) for case in cases
        ]
    while number < EACH * len(sources) or time.monotonic() < end:
        data, path = sources[number % len(sources)]
        check(data if number < len(sources) else damaged(data, choose), path, worker)
        number += 1
