"""Files as strangers may send them: valid ones of every kind, random damage to them, and their readers.

    python -m tests.support.mutation SECONDS SEED FOLDER

damages and reads files until the time is over. FOLDER/current has the file that is being read, which is at fault if the
process dies or hangs; a file whose reader raises anything but a `DcarError` is kept in FOLDER/found. Both are named
KIND/FILE/CASE, as in tests/corpus, whose files are damaged further.
"""

import atexit
import base64
import csv
import hashlib
import io
import json
import random
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
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
from tests.support.files import write_json
from tests.support.images import encoded
from tests.support.paths import ROOT
from tests.support.tiny_models import write_tiny_model

CORPUS = ROOT / "tests" / "corpus"
HANGS_S = 20
_MEMORY = 6 * 2**30  # of addresses; libraries reserve most of it
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


class Kind(NamedTuple):
    """Files of one kind. write: valid ones into a folder; read: one of them, beside the others."""

    write: Callable[[Path], object]
    read: Callable[[Path], object]


def _write_lists(folder: Path) -> None:
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "caption", "category", "price", "tags"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "tags": json.dumps(row["tags"])} for row in ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "pairs.parquet")
    with tarfile.open(folder / "pairs.tar", mode="w") as tar:
        for name, content in (("1.jpg", b"x" * 100), ("1.json", json.dumps(ROWS[0]).encode()), ("1.txt", b"hi\nho")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


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
        path = _valid(self.kind, folder) / self.name
        whole = path.read_bytes()
        path.unlink()  # a mapped file is never written into
        path.write_bytes(self.data)
        try:
            KINDS[self.kind].read(path)
        except DcarError:
            pass
        finally:
            path.unlink(missing_ok=True)
            path.write_bytes(whole)


def _valid(kind: str, folder: Path) -> Path:
    place = folder / kind
    if not place.exists():
        place.mkdir(parents=True)
        KINDS[kind].write(place)
    return place


def valid_files(folder: Path) -> Iterator[Source]:
    """Write the valid files of every kind below a folder, and yield the small ones."""
    for kind in KINDS:
        for path in sorted(_valid(kind, folder).iterdir()):
            if path.is_file() and path.stat().st_size <= _LARGEST:
                yield Source(kind, path.name, path.read_bytes())


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


def main(seconds: float, seed: int, folder: Path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    choose, end, count = random.Random(seed), time.monotonic() + seconds, 0
    sources = [*valid_files(folder / "valid"), *(source for _, source in corpus())]
    kinds = {kind: [source for source in sources if source.kind == kind] for kind in KINDS}
    while time.monotonic() < end:
        source = choose.choice(choose.choice([*kinds.values()]))
        source = source._replace(data=damaged(source.data, choose))
        case = Path(source.kind, source.name, hashlib.sha256(source.data).hexdigest()[:8])
        (folder / "current").write_text(json.dumps([str(case), base64.b64encode(source.data).decode()]))
        signal.alarm(HANGS_S)  # which ends the process, wherever it is
        try:
            source.read(folder / "valid")
        except BaseException:
            keep(folder)
            sys.stderr.write(f"{case}: {traceback.format_exc()}\n")
        signal.alarm(0)
        count += 1
    (folder / "current").unlink(missing_ok=True)
    sys.stdout.write(f"{count} files were read\n")


def keep(folder: Path) -> Path | None:
    """Move the file that was being read to FOLDER/found, and return its place; None if there is none."""
    if not (folder / "current").exists():
        return None
    case, data = json.loads((folder / "current").read_bytes())
    place = folder / "found" / case
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(base64.b64decode(data))
    (folder / "current").unlink()
    return place


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
