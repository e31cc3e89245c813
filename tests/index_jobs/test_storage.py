"""Galleries elsewhere: fsspec's memory store, a real HTTP server, and what a service may read of them."""

import functools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.util.errors import ArtifactError, DataError, ImageFault, MissingExtraError
from index_jobs.encoding.encode import encode_gallery
from index_jobs.encoding.shards import FailedImage
from index_jobs.gallery.scan import scan
from index_jobs.gallery.storage import (
    WHOLE_FILE,
    ImageLocation,
    cut_span,
    file_suffix,
    join_location,
    open_image,
    parent_folder,
    read_images,
)
from index_jobs.index.index_version import ImageAccess
from index_jobs.index.versions import open_current
from index_jobs.spec import BuildOptions, IndexSpec
from tests.support.files import write_file, write_jsonl, write_tar
from tests.support.galleries import rows_of
from tests.support.images import png
from tests.support.parts import needs
from tests.support.processes import answering
from tests.support.versions import Build


def _options(max_failed: float = IndexSpec.max_failed, **options: Any) -> BuildOptions:
    return BuildOptions.of({"max_failed": max_failed, "progress": False, **options})


class Server(SimpleHTTPRequestHandler):
    """Serve a folder, and ranges of its files. Requests for names in `stumbles` fail."""

    stumbles: dict[str, int]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.stumbles.get(self.path, 0) > 0:
            self.stumbles[self.path] -= 1
            self.send_error(503)
            return
        span = self.headers.get("Range")
        if span is None:
            super().do_GET()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = span.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Listener(ThreadingHTTPServer):
    request_queue_size = 64  # of 5, some of many connections at a time would wait a second for another attempt


Served = tuple[Path, str, type[Server]]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A folder, its URL, and the server that serves it."""
    root = tmp_path / "served"
    root.mkdir()
    handler = type("Handler", (Server,), {"stumbles": {}, "asked": []})
    server = Listener(("127.0.0.1", 0), functools.partial(handler, directory=str(root)))
    with answering(server):
        yield root, f"http://127.0.0.1:{server.server_port}", handler


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    memory.pipe(
        {"/g/b.png": png("blue"), "/g/deep/a.png": png("green"), "/g/.hidden/c.png": png(), "/g/notes.txt": b"x"}
    )
    yield memory
    memory.rm("/", recursive=True)


@pytest.mark.parametrize(
    ("root", "location", "place"),
    [
        ("/data", "a/b.png", "/data/a/b.png"),
        ("/data", "/else/b.png", "/else/b.png"),
        ("/data", "s3://bucket/b.png", "s3://bucket/b.png"),
        ("s3://bucket/g/", "a/b.png", "s3://bucket/g/a/b.png"),
        ("memory://", "b.png", "memory://b.png"),
    ],
)
def test_locations_are_joined_and_split(root: str, location: str, place: str) -> None:
    assert join_location(root, location) == place
    assert file_suffix(place) == ".png"
    assert join_location(parent_folder(place), "x.png") == place.replace("b.png", "x.png")


def test_a_span_is_cut_from_the_response_of_a_server_without_ranges() -> None:
    span = ImageLocation(0, "a.tar", 3, 4)
    assert cut_span(b"0123456789", span, "a.tar") == cut_span(b"3456", span, "a.tar") == b"3456"
    assert isinstance(cut_span(b"012345", span, "a.tar"), ValueError)


def test_a_store_is_a_gallery_like_a_folder(store: Any, tmp_path: Path) -> None:
    store.pipe("/g/metadata.jsonl", b'{"file_name": "deep/a.png", "caption": "green"}\n')
    gallery = scan("memory://g")
    assert gallery.table["name"].to_pylist() == ["b.png", "deep/a.png"]
    assert rows_of(gallery)["deep/a.png"]["caption"] == "green"
    for name, color in (("b.png", "blue"), ("deep/a.png", "green")):
        write_file(tmp_path / name, png(color))
    assert gallery.table["id"] == scan(tmp_path).table["id"]
    assert scan("memory://g").vectors_signature == gallery.vectors_signature
    store.pipe("/g/b.png", png("red"))
    assert scan("memory://g").vectors_signature != gallery.vectors_signature


def test_a_list_may_mix_urls_and_paths(store: Any, tmp_path: Path) -> None:
    write_file(tmp_path / "c.png", png("black"))
    path = write_jsonl(tmp_path / "l.jsonl", {"url": "memory://g/b.png", "caption": "b"}, {"url": "c.png"})
    gallery = scan(path)
    assert gallery.table["location"].to_pylist() == ["memory://g/b.png", "c.png"]
    places = [
        ImageLocation(i, location, WHOLE_FILE, 0) for i, location in enumerate(gallery.table["location"].to_pylist())
    ]
    assert read_images(gallery.root, places) == [png("blue"), png("black")]
    store.pipe("/g/list.csv", b"path,caption\ndeep/a.png,a\n")
    remote = scan("memory://g/list.csv")
    (row,) = remote.table.to_pylist()
    assert (row["location"], row["caption"]) == ("deep/a.png", "a")
    file, _ = open_image(remote.root, row["location"], row["offset"], row["size"])
    assert file.read() == png("green")


def test_galleries_of_the_same_names_at_two_urls_share_no_vector(
    store: Any, build: Build, encoder: Encoder, tmp_path: Path
) -> None:
    """Nothing else tells the rows of the lists apart, since nobody asks for the size of a list's images."""
    for season, color in (("spring", "red"), ("summer", "blue")):
        store.pipe({f"/{season}/a.png": png(color), f"/{season}/items.csv": b"file_name\na.png\n"})
        assert build(f"memory://{season}/items.csv").encoded == 1
        write_file(tmp_path / f"{color}.png", png(color))
        expected = encoder.encode_images([tmp_path / f"{color}.png"])
        np.testing.assert_allclose(open_current(tmp_path / "index").vectors(np.arange(1)), expected, atol=1e-6)
    store.pipe({"/summer/b.png": png("green"), "/summer/items.csv": b"file_name\na.png\nb.png\n"})
    grown = build("memory://summer/items.csv")
    assert (grown.encoded, grown.resumed) == (1, 1)


@pytest.mark.slow
@needs("http")
def test_an_http_gallery_gives_the_vectors_of_its_folder(
    served: Served, build: Build, tiny_gallery: Path, tmp_path: Path
) -> None:
    root, url, _ = served
    shutil.copytree(tiny_gallery, root / "g")
    members = {path.name: path.read_bytes() for path in (root / "g" / "circle").iterdir()}
    write_tar(root / "g" / "shard.tar", members)
    shutil.rmtree(root / "g" / "circle")
    local = build(root / "g", out=tmp_path / "a")
    remote = build(f"{url}/g/", out=tmp_path / "b")
    assert (remote.count, remote.failed) == (local.count, 0)
    ours, theirs = open_current(tmp_path / "a"), open_current(tmp_path / "b")
    for row in range(local.count):
        assert ours.item(row) == theirs.item(row)
        assert ours.image_bytes(row) == theirs.image_bytes(row)
    every = np.arange(local.count)
    np.testing.assert_array_equal(ours.vectors(every), theirs.vectors(every))
    shutil.rmtree(root / "g")
    with pytest.raises(ArtifactError, match="cannot be read from the gallery http://"):
        theirs.image_bytes(0)


@needs("http")
def test_network_errors_are_retried(
    served: Served, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, url, handler = served
    names = ["a.png", "b.png", "gone.png", "down.png"]
    for name in (*names[:2], "down.png"):
        write_file(root / name, png())
    handler.stumbles.update({"/b.png": 2, "/down.png": 99})
    monkeypatch.setattr("index_jobs.gallery.storage.read_images.__defaults__", ((0.01, 0.01, 0.01),))
    gallery = scan(write_jsonl(tmp_path / "l.jsonl", *({"url": f"{url}/{name}"} for name in names)))
    encoded = encode_gallery(gallery, [encoder], tmp_path / "w", _options(0.5))
    assert encoded.rows().tolist() == [0, 1]
    (gone, down) = encoded.failed
    assert gone == FailedImage(2, "no such file", ImageFault.MISSING)
    assert (down.row, down.fault) == (3, ImageFault.UNREADABLE)
    assert "503" in down.reason
    asked = [handler.asked.count(f"/{name}") for name in names]
    assert asked == [1, 3, 1, 4]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("memory://nowhere", "memory://nowhere does not exist"),
        ("memory://g/none.jsonl", "memory://g/none.jsonl cannot be read"),
        ("memory://g/none.tar", "memory://g/none.tar cannot be read"),
        ("memory://g/.hidden/..", "does not exist|is empty"),
        ("nosuch://g", "nosuch://g cannot be read: the schemes of galleries are abfs, .*, https, "),
        pytest.param(
            "http://127.0.0.1:9/g",
            "http://127.0.0.1:9/g does not exist, or its store cannot be reached",
            marks=needs("http"),
        ),
        pytest.param(
            "http://127.0.0.1:9/list.csv",
            "list.csv cannot be read: it does not exist, or its store cannot be reached",
            marks=needs("http"),
        ),
    ],
)
def test_a_bad_url_is_an_error_that_names_it(store: Any, place: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        scan(place)


@pytest.mark.parametrize(
    "url",
    ["zip://a.png", "reference://a.json", "github://a:b@main/c.png", "simplecache::memory://g/b.png", "dir://a/b.png"],
)
def test_only_urls_of_known_schemes_are_opened(store: Any, tmp_path: Path, url: str) -> None:
    """fsspec would open archives, ask servers that the list chooses, or fail in the middle."""
    says = f"^{url} cannot be read: the schemes of galleries are [a-z0-9, ]*$"
    for place in (url, write_jsonl(tmp_path / "l.jsonl", {"url": url})):
        with pytest.raises(DataError, match=says):
            scan(place)
    (refused,) = read_images("", [ImageLocation(0, url, WHOLE_FILE, 0)], pauses=())
    assert isinstance(refused, DataError)


def test_a_device_at_a_file_url_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "a.png", png())
    os.mkfifo(tmp_path / "pipe.png")
    places = [ImageLocation(0, f"file://{tmp_path}/{name}", WHOLE_FILE, 0) for name in ("a.png", "pipe.png")]
    image, refused = read_images("", places, pauses=())
    assert image == png()
    assert "neither a file" in str(refused)


def test_missing_package_is_an_error_before_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"reading s3:// URLs .* pip install 'dcar\[s3\]'"):
        scan("s3://bucket/gallery")
    with pytest.raises(MissingExtraError, match=r"dcar\[s3\]"):
        scan(write_jsonl(tmp_path / "l.jsonl", {"url": "s3://bucket/a.png"}))


def test_a_local_file_url_is_a_path(tmp_path: Path) -> None:
    write_file(tmp_path / "a.png", png())
    assert scan(f"file://{tmp_path}").location == str(tmp_path)
    assert json.loads(scan(f"file://{tmp_path}").table["metadata"][0].as_py()) == {"file_name": "a.png", "title": "a"}


def test_impossible_path_is_an_unreadable_image(store: Any, tmp_path: Path) -> None:
    write_file(tmp_path / "a.png", png())
    names = ["a.png", "b\0.png", "\ud800.png", "memory://g/b.png", "memory://g/b\0.png", "x" * 5000]
    found = read_images(
        str(tmp_path), [ImageLocation(i, name, WHOLE_FILE, 0) for i, name in enumerate(names)], pauses=()
    )
    assert [isinstance(data, bytes) for data in found] == [True, False, False, True, False, False]
    with pytest.raises(OSError, match="not a path: embedded null byte"):
        open_image(str(tmp_path), names[1], WHOLE_FILE, 0)


def test_location_hash_covers_every_field_but_row_and_location() -> None:
    place = ImageLocation(0, "/disk/a.tar", 512, 100, 7, "a.tar/1.png")
    assert replace(place, row=9, location="/moved/a.tar").location_hash == place.location_hash
    changes = {"name": "a.tar/2.png", "offset": 0, "size": 99, "version": 8}
    others: list[dict[str, Any]] = [{name: value} for name, value in changes.items()]
    assert len({place.location_hash, *(replace(place, **other).location_hash for other in others)}) == 5


def resolve(access: ImageAccess, root: str | Path, location: str, offset: int = WHOLE_FILE, size: int = 0) -> str:
    return access.resolve(str(root), location, offset, size)


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    root = tmp_path / "gallery"
    root.mkdir()
    (root / "a.png").write_bytes(b"image")
    (tmp_path / "secret").write_bytes(b"secret")
    return root


def test_files_below_the_root_or_an_allowed_one_are_read(gallery: Path, tmp_path: Path) -> None:
    (gallery / "link.png").symlink_to(gallery / "a.png")
    for location in ("a.png", "link.png", str(gallery / "a.png")):
        assert resolve(ImageAccess(), gallery, location) == str(gallery / "a.png")
    assert resolve(ImageAccess(), f"file://{gallery}", "a.png") == str(gallery / "a.png")
    assert resolve(ImageAccess(roots=(tmp_path,)), gallery, "../secret") == str(tmp_path / "secret")


def test_links_and_paths_that_leave_the_root_are_refused(gallery: Path, tmp_path: Path) -> None:
    (gallery / "link.png").symlink_to(tmp_path / "secret")
    for location in ("link.png", "../secret", str(tmp_path / "secret"), f"file://{tmp_path}/secret", "/etc/passwd"):
        for root in (str(gallery), f"file://{gallery}"):
            with pytest.raises(PermissionError):
                resolve(ImageAccess(), root, location)


def test_large_files_are_refused(gallery: Path) -> None:
    access = ImageAccess(max_bytes=4)
    for span in ((WHOLE_FILE, 0), (0, 5)):
        with pytest.raises(OSError, match="too large"):
            resolve(access, gallery, "a.png", *span)
    assert resolve(access, gallery, "a.png", 0, 4)


def test_urls_need_an_allowed_host_and_a_remote_scheme(gallery: Path) -> None:
    access = ImageAccess(hosts=frozenset({"shop.example"}))
    assert resolve(access, gallery, "https://shop.example/a.png") == "https://shop.example/a.png"
    for location in (
        "https://other.example/a.png",
        "https://shop.example@other.example/a.png",
        "file://shop.example/etc/passwd",
        "zip://a.png::file:///tmp/a.zip",
        "simplecache::https://shop.example/a.png",
    ):
        with pytest.raises(PermissionError):
            resolve(access, gallery, location)


def test_relative_rows_of_a_remote_gallery_are_read_below_its_root() -> None:
    assert resolve(ImageAccess(), "s3://bucket/images", "b/a.png") == "b/a.png"
    with pytest.raises(PermissionError):
        resolve(ImageAccess(), "s3://bucket/images", "../other/a.png")
