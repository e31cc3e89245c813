"""Damaged files of every kind are read, or refused with a `DcarError`: those that once were not, and new ones.

`MUTATE_S=300 make test ARGS="-k damaged"` looks for more, for five minutes a kind. What it finds belongs into
tests/corpus/KIND/FILE/CASE once it is mended.
"""

import atexit
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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

EACH, SECONDS, SEED = 10, float(os.environ.get("MUTATE_S", "0")), int(os.environ.get("MUTATE_SEED", "0"))
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of libraries, about what is damaged
    pytest.mark.timeout(120 + SECONDS),
]
CORPUS = ROOT / "tests" / "corpus"
_LARGEST = 2**16  # bytes of a file that is damaged
ROWS: list[dict[str, Any]] = [
    {"path": "a.png", "caption": "a cat", "captions": ["x", "y"], "category": "cat", "price": 9.5, "tags": ["new"]},
    {"path": "b.png", "caption": "a dog", "captions": ["z"], "category": "dog", "price": 1.0, "tags": []},
]
_FDRD = {
    "a": {"file_name": "a", "file_path": "/x/a.jpg", "positive": "A cat.", "negative": ["A dog."], "class_name": "cat"}
}
_PIECES = [b"\xef\xbb\xbf", b"\xed\xa0\x80", b"1e999", b"NaN", b"9" * 40, b"null", b"\r", b"[[[[", b'{"a":' * 5, b"\0"]
_VALUES: list[Any] = [
    None, True, -1, 2**70, 1e308, "", "x" * 300, "\ud800", [], {}, [[]], {"": None}, "../../x", "http://x/y",
]  # fmt: skip


class Kind(NamedTuple):
    """Files of one kind. write: valid ones into a folder; read: one of them, beside the others."""

    write: Callable[[Path], object]
    read: Callable[[Path], object]


def _write_lists(folder: Path) -> None:
    write_rows(folder / "pairs.jsonl", ROWS)
    write_rows(folder / "pairs.parquet", ROWS)
    flat = [{name: value for name, value in row.items() if name != "captions"} for row in ROWS]
    write_rows(folder / "pairs.csv", [row | {"tags": json.dumps(row["tags"])} for row in flat])
    write_tar(folder / "pairs.tar", {"1.jpg": b"x" * 100, "1.json": json.dumps(ROWS[0]).encode(), "1.txt": b"hi\nho"})


def _write_annotations(folder: Path) -> None:
    _write_lists(folder)
    write_json(folder / "train.json", _FDRD)


def _write_images(folder: Path) -> None:
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP"):
        (folder / kind.lower()).write_bytes(encoded(Image.effect_noise((48, 40), 90), kind))


@cache
def _worker() -> DecodeWorker:
    worker = DecodeWorker()
    atexit.register(worker.close)
    return worker


def _read_image(path: Path) -> None:
    decoder = Preprocess(32, (0.5,) * 3, (0.5,) * 3).fast().decoder()
    _worker().run(decoder, path.read_bytes(), Limits(64 * 2**20, seconds=0.5, seconds_per_pixel=0.0))


def _read_model(path: Path) -> None:
    load_backbone(BackboneSource(str(path.parent))).tokenize(["a red cat", "x" * 40])


def _write_model(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for file in write_tiny_model(name, folder / "model").iterdir():
            file.rename(folder / file.name)

    return write


def _write_checkpoint(folder: Path) -> None:
    save_zero_shot(load_backbone(BackboneSource(str(write_tiny_model("ViT-B-32", folder / "base")))), folder)


def _write_manifest(folder: Path) -> None:
    spec = IndexSpec(gallery="g", gallery_signature="s", fingerprint="f")
    (folder / "1.json").write_bytes(Manifest(spec=spec, dim=4, files={"a": FileInfo(1, "0" * 64)}).to_bytes())


def _read_manifest(path: Path) -> None:
    """Read a manifest with the checksum of what it says, as its author would write it."""
    try:
        values = json.loads(path.read_bytes())
        values.pop("checksum", None)
        path.write_text(json.dumps(values | {"checksum": hash_json(values)}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    Manifest.parse(path.read_bytes(), path.name)


KINDS = {
    "annotations": Kind(_write_annotations, lambda path: Annotations(path).load("train", "ignore")),
    "galleries": Kind(_write_lists, scan),
    "images": Kind(_write_images, _read_image),
    "models": Kind(_write_model("ViT-B-32"), _read_model),
    "tokenizers": Kind(_write_model("ViT-L-14-CLIPA"), _read_model),
    "checkpoints": Kind(_write_checkpoint, lambda path: load_checkpoint(path.parent)),
    "manifests": Kind(_write_manifest, _read_manifest),
}


class Source(NamedTuple):
    """A file that readers get: its kind, its name, and its bytes."""

    kind: str
    name: str
    data: bytes

    def read(self, folder: Path) -> None:
        """Let the reader of its kind read it among valid files below a folder. A `DcarError` is a good answer."""
        path = folder / self.kind / self.name
        whole = path.read_bytes()
        path.unlink()  # a mapped file is never written into
        path.write_bytes(self.data)
        try:
            KINDS[self.kind].read(path)
        except DcarError:
            pass
        except BaseException as error:
            (folder / "kept").write_bytes(self.data)
            error.add_note(f"by {folder / 'kept'} as {self.kind}/{self.name}")
            raise
        finally:
            path.unlink(missing_ok=True)
            path.write_bytes(whole)


def corpus() -> Iterator[tuple[str, Source]]:
    """Yield files that once ended a reader otherwise than by a `DcarError`, with their names."""
    for path in sorted(CORPUS.glob("*/*/*")):
        kind, name = path.parts[-3:-1]
        yield "/".join(path.parts[-3:]), Source(kind, name, path.read_bytes())


def damaged(data: bytes, choose: random.Random) -> bytes:
    """Return bytes with a few changes: of bits and pieces, or of values if they are JSON."""
    try:
        return _changed_json(data, choose) if choose.random() < 0.5 else _changed_bytes(data, choose)
    except (ValueError, RecursionError):
        return _changed_bytes(data, choose)


def _changed_bytes(data: bytes, choose: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(choose.randint(1, 5)):
        place = choose.randrange(len(changed) + 1)
        end = place + choose.randint(1, 64)
        kind = choose.randrange(4)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del changed[place:end]
        elif kind == 2:
            changed[place:place] = changed[place:end] * choose.choice([1, 50])
        else:
            changed[place:place] = choose.choice(_PIECES)
    return bytes(changed)


def _changed_json(data: bytes, choose: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(choose.randint(1, 3)):
        inner: Any = value
        while isinstance(inner, dict | list) and inner:
            key = choose.choice([*inner]) if isinstance(inner, dict) else choose.randrange(len(inner))
            if choose.random() < 0.3 or not isinstance(inner[key], dict | list):
                inner[key] = choose.choice(_VALUES)
                break
            inner = inner[key]
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid files of every kind, in a folder each."""
    folder = tmp_path_factory.mktemp("valid")
    for kind in KINDS:
        (folder / kind).mkdir()
        KINDS[kind].write(folder / kind)
    return folder


@pytest.mark.parametrize(("name", "source"), [*corpus()], ids=lambda given: given if isinstance(given, str) else "")
def test_what_once_got_through_is_refused(name: str, source: Source, folder: Path) -> None:
    assert source.kind in KINDS
    assert len(source.data) < 2**14
    source.read(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind: str, folder: Path) -> None:
    choose, end, number = random.Random(SEED), time.monotonic() + SECONDS, 0
    files = [path for path in sorted((folder / kind).iterdir()) if path.is_file() and path.stat().st_size <= _LARGEST]
    sources = [Source(kind, path.name, path.read_bytes()) for path in files]
    sources += [source for _, source in corpus() if source.kind == kind and SECONDS]
    while number < EACH * len(sources) or time.monotonic() < end:
        source = sources[number % len(sources)]
        data = source.data if number < len(sources) else damaged(source.data, choose)
        source._replace(data=data).read(folder)
        number += 1
