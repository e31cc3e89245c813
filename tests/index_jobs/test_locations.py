"""Galleries elsewhere: fsspec's memory store, a real HTTP server, and what a service
may read of them.
"""

import functools
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from dcar_core import Encoder
from dcar_core.util.errors import (
    ArtifactError,
    DataError,
    ImageFault,
    MissingExtraError,
)
from index_jobs.encoding.decode import FailedImage
from index_jobs.encoding.encode import encode_gallery
from index_jobs.gallery.locations import (
    WHOLE_FILE,
    ImageLocation,
    cut_span,
    file_suffix,
    join_location,
    open_image,
    parent_folder,
    read_images,
)
from index_jobs.gallery.scan import scan
from index_jobs.index.index_version import ImageAccess
from index_jobs.index.versions import open_current
from index_jobs.spec import BuildOptions
from tests.support.files import write_file, write_jsonl, write_tar
from tests.support.galleries import rows_of
from tests.support.images import png
from tests.support.parts import needs
from tests.support.processes import answering
from tests.support.versions import Build


class Server(SimpleHTTPRequestHandler):
    """Serve a folder, and ranges of its files. Requests for names in `stumbles`
    fail.
    """

    stumbles: dict[str, int]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.stumbles.get(self.path, 0) > 0:
            self.stumbles[self.path] -= 1
            self.send_error(503)
        elif (span := self.headers.get("Range")) is None:
            super().do_GET()
        else:
            data = Path(self.translate_path(self.path)).read_bytes()
            first, last = span.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1 if last else None]
            self.send_response(206)
            self.send_header(
                "Content-Range",
                f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}",
            )
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Listener(ThreadingHTTPServer):
    # of 5, some of many connections at a time would wait a second for another attempt
    request_queue_size = 64


Served = tuple[Path, str, type[Server]]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A folder, its URL, and the server that serves it."""
    (root := tmp_path / "served").mkdir()
    handler = type(
        "Handler",
        (Server,),
        {"stumbles": {}, "asked": []},
    )
    server = Listener(("127.0.0.1", 0), functools.partial(handler, directory=str(root)))
    with answering(server):
        yield root, f"http://127.0.0.1:{server.server_port}", handler


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    memory.pipe(
        {
            "/g/b.png": png("blue"),
            "/g/deep/a.png": png("green"),
            "/g/.hidden/c.png": png(),
            "/g/notes.txt": b"x",
        }
    )
    yield memory
    memory.rm("/", recursive=True)


def test_a_store_is_a_gallery_like_a_folder(store: Any, tmp_path: Path) -> None:
    store.pipe(
        "/g/metadata.jsonl", b'{"file_name": "deep/a.png", "caption": "green"}\n'
    )
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
    path = write_jsonl(
        tmp_path / "l.jsonl",
        {"url": "memory://g/b.png", "caption": "b"},
        {"url": "c.png"},
    )
    gallery = scan(path)
    assert gallery.table["location"].to_pylist() == ["memory://g/b.png", "c.png"]
    places = [
        ImageLocation(i, location, WHOLE_FILE, 0)
        for i, location in enumerate(gallery.table["location"].to_pylist())
    ]
    assert read_images(gallery.root, places) == [png("blue"), png("black")]
    store.pipe("/g/list.csv", b"path,caption\ndeep/a.png,a\n")
    remote = scan("memory://g/list.csv")
    (row,) = remote.table.to_pylist()
    assert row["location"] == "deep/a.png"
    assert row["caption"] == "a"
    file, _ = open_image(remote.root, row["location"], row["offset"], row["size"])
    assert file.read() == png("green")


def test_galleries_of_equal_names_share_no_vector(
    store: Any,
    build: Build,
    encoder: Encoder,
    tmp_path: Path,
) -> None:
    """Nothing else tells the rows of the lists apart, since nobody asks for the size of
    a list's images.
    """
    for season, color in (("spring", "red"), ("summer", "blue")):
        store.pipe(
            {
                f"/{season}/a.png": png(color),
                f"/{season}/items.csv": b"file_name\na.png\n",
            }
        )
        assert build(f"memory://{season}/items.csv").encoded == 1
        write_file(tmp_path / f"{color}.png", png(color))
        expected = encoder.encode_images([tmp_path / f"{color}.png"])
        np.testing.assert_allclose(
            open_current(tmp_path / "index").vectors(np.arange(1)),
            expected,
            atol=1e-6,
        )
    store.pipe(
        {
            "/summer/b.png": png("green"),
            "/summer/items.csv": b"file_name\na.png\nb.png\n",
        }
    )
    grown = build("memory://summer/items.csv")
    assert grown.encoded == 1
    assert grown.resumed == 1


@pytest.mark.slow
@needs("http")
def test_an_http_gallery_gives_the_vectors_of_its_folder(
    served: Served,
    build: Build,
    tiny_gallery: Path,
    tmp_path: Path,
) -> None:
    root, url, _ = served
    shutil.copytree(tiny_gallery, root / "g")
    members = {
        path.name: path.read_bytes() for path in (root / "g" / "circle").iterdir()
    }
    write_tar(root / "g" / "shard.tar", members)
    shutil.rmtree(root / "g" / "circle")
    local = build(root / "g", out=tmp_path / "a")
    remote = build(f"{url}/g/", out=tmp_path / "b")
    assert remote.count == local.count
    assert remote.failed == 0
    ours = open_current(tmp_path / "a")
    theirs = open_current(tmp_path / "b")
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
    served: Served,
    encoder: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, url, handler = served
    names = ["a.png", "b.png", "gone.png", "down.png"]
    for name in (*names[:2], "down.png"):
        write_file(root / name, png())
    handler.stumbles.update({"/b.png": 2, "/down.png": 99})
    monkeypatch.setattr(
        "index_jobs.gallery.locations.read_images.__defaults__", ((0.01, 0.01, 0.01),)
    )
    gallery = scan(
        write_jsonl(tmp_path / "l.jsonl", *({"url": f"{url}/{name}"} for name in names))
    )
    encoded = encode_gallery(
        gallery,
        [encoder],
        tmp_path / "w",
        BuildOptions.of({"max_failed": 0.5, "progress": False}),
    )
    assert encoded.rows().tolist() == [0, 1]
    gone, down = encoded.failed
    assert gone == FailedImage(2, "no such file", ImageFault.MISSING)
    assert down.row == 3
    assert down.fault == ImageFault.UNREADABLE
    assert "503" in down.reason
    asked = [handler.asked.count(f"/{name}") for name in names]
    assert asked == [1, 3, 1, 4]


def test_missing_package_is_an_error_before_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"reading s3:// URLs needs .*s3"):
        scan("s3://bucket/gallery")
    with pytest.raises(MissingExtraError, match="reading s3:// URLs"):
        scan(write_jsonl(tmp_path / "l.jsonl", {"url": "s3://bucket/a.png"}))


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("memory://nowhere", "memory://nowhere does not exist"),
        ("memory://g/none.jsonl", "memory://g/none.jsonl cannot be read"),
        ("memory://g/none.tar", "memory://g/none.tar cannot be read"),
        ("memory://g/.hidden/..", "does not exist|is empty"),
        (
            "http://127.0.0.1:9/g",
            "http://127.0.0.1:9/g does not exist, or its store cannot be reached",
        ),
        ("http://127.0.0.1:9/list.csv", "list.csv cannot be read: "),
    ],
)
@needs("http")
def test_a_bad_url_is_an_error_that_names_it(store: Any, place: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        scan(place)


@pytest.mark.parametrize(
    "url",
    [
        "nosuch://g",
        "zip://a.png",
        "github://a:b@main/c.png",
        "simplecache::memory://g/b.png",
    ],
)
def test_only_urls_of_known_schemes_are_opened(
    store: Any,
    tmp_path: Path,
    url: str,
) -> None:
    """fsspec would open archives, ask servers that the list chooses, or fail in the
    middle.
    """
    says = f"^{url} cannot be read: the schemes of galleries are [a-z0-9, ]*$"
    for place in (url, write_jsonl(tmp_path / "l.jsonl", {"url": url})):
        with pytest.raises(DataError, match=says):
            scan(place)
    (refused,) = read_images("", [ImageLocation(0, url, WHOLE_FILE, 0)], pauses=())
    assert isinstance(refused, DataError)


def test_impossible_path_is_an_unreadable_image(store: Any, tmp_path: Path) -> None:
    write_file(tmp_path / "a.png", png())
    os.mkfifo(tmp_path / "pipe.png")
    assert scan(f"file://{tmp_path}").location == str(tmp_path)
    good = ["a.png", f"file://{tmp_path}/a.png", "memory://g/b.png"]
    bad = [
        "b\0.png",
        "\ud800.png",
        "memory://g/b\0.png",
        "x" * 5000,
        f"file://{tmp_path}/pipe.png",
    ]
    places = [ImageLocation(0, name, WHOLE_FILE, 0) for name in [*good, *bad]]
    found = read_images(str(tmp_path), places, pauses=())
    assert [isinstance(data, bytes) for data in found] == [True] * len(good) + [
        False
    ] * len(bad)
    assert "neither a file" in str(found[-1])
    with pytest.raises(OSError, match="not a path: embedded null byte"):
        open_image(str(tmp_path), bad[0], WHOLE_FILE, 0)


def test_locations_are_joined_split_and_cut() -> None:
    for root, location, place in (
        ("/data", "a/b.png", "/data/a/b.png"),
        ("/data", "/else/b.png", "/else/b.png"),
        ("/data", "s3://bucket/b.png", "s3://bucket/b.png"),
        ("memory://", "b.png", "memory://b.png"),
        ("s3://bucket/g/", "a/b.png", "s3://bucket/g/a/b.png"),
    ):
        assert join_location(root, location) == place
        assert file_suffix(place) == ".png"
        assert join_location(parent_folder(place), "x.png") == place.replace(
            "b.png", "x.png"
        )
    span = ImageLocation(0, "a.tar", 3, 4)
    assert (
        cut_span(b"0123456789", span, "a.tar")
        == cut_span(b"3456", span, "a.tar")
        == b"3456"
    )
    assert isinstance(cut_span(b"012345", span, "a.tar"), ValueError), (
        "of a server without ranges"
    )
    whole = ImageLocation(0, "/disk/a.tar", 512, 100, 7, "a.tar/1.png")
    assert (
        replace(whole, row=9, location="/moved/a.tar").location_hash
        == whole.location_hash
    )
    changes: list[dict[str, Any]] = [
        {"name": "a.tar/2.png"},
        {"offset": 0},
        {"size": 99},
        {"version": 8},
    ]
    assert (
        len(
            {
                whole.location_hash,
                *(replace(whole, **change).location_hash for change in changes),
            }
        )
        == 5
    )


HOSTS = {"hosts": frozenset({"shop.example"})}
SMALL = {"max_bytes": 4}
REMOTE = "s3://bucket/images"
ALLOWED: list[tuple[dict[str, Any], str, str, tuple[int, int], str]] = [
    ({}, "G", "a.png", (WHOLE_FILE, 0), "G/a.png"),
    ({}, "G", "link.png", (WHOLE_FILE, 0), "G/a.png"),
    ({}, "G", "G/a.png", (WHOLE_FILE, 0), "G/a.png"),
    ({}, "file://G", "a.png", (WHOLE_FILE, 0), "G/a.png"),
    ({"roots": "G"}, "G/deep", "../a.png", (WHOLE_FILE, 0), "G/a.png"),
    (SMALL, "G", "a.png", (0, 4), "G/a.png"),
    (
        HOSTS,
        "G",
        "https://shop.example/a.png",
        (WHOLE_FILE, 0),
        "https://shop.example/a.png",
    ),
    ({}, REMOTE, "b/a.png", (WHOLE_FILE, 0), "b/a.png"),
]
REFUSED: list[tuple[dict[str, Any], str, str, tuple[int, int]]] = [
    *(
        ({}, root, location, (WHOLE_FILE, 0))
        for root, location in product(
            ("G", "file://G"),
            (
                "away.png",
                "../secret",
                "G/../secret",
                "file://G/../secret",
                "/etc/passwd",
            ),
        )
    ),
    *((SMALL, "G", "a.png", span) for span in ((WHOLE_FILE, 0), (0, 5))),
    *(
        (HOSTS, "G", location, (WHOLE_FILE, 0))
        for location in (
            "https://other.example/a.png",
            "https://shop.example@other.example/a.png",
            "file://shop.example/etc/passwd",
            "zip://a.png::file:///tmp/a.zip",
            "simplecache::https://shop.example/a.png",
        )
    ),
    ({}, REMOTE, "../other/a.png", (WHOLE_FILE, 0)),
]


def test_a_service_reads_images_below_the_roots_and_of_the_hosts_that_are_allowed(
    tmp_path: Path,
) -> None:
    """G stands for the folder of the gallery."""
    root = tmp_path / "gallery"
    write_file(root / "deep" / "b.png", b"image")
    write_file(root / "a.png", b"image")
    write_file(tmp_path / "secret", b"secret")
    (root / "link.png").symlink_to(root / "a.png")
    (root / "away.png").symlink_to(tmp_path / "secret")

    def resolve(
        options: dict[str, Any],
        gallery: str,
        location: str,
        span: tuple[int, int],
    ) -> str:
        access = ImageAccess(
            **options | ({"roots": (root,)} if "roots" in options else {})
        )
        return access.resolve(
            gallery.replace("G", str(root)),
            location.replace("G", str(root)),
            *span,
        )

    for options, gallery, location, span, wanted in ALLOWED:
        assert resolve(options, gallery, location, span) == wanted.replace(
            "G", str(root)
        )
    for options, gallery, location, span in REFUSED:
        with pytest.raises(
            OSError, match="too large" if options is SMALL else None
        ) as refused:
            resolve(options, gallery, location, span)
        assert isinstance(refused.value, PermissionError) or options is SMALL
