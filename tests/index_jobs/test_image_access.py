"""A service reads images only from the gallery's root and from places that its operator allows."""

from pathlib import Path

import pytest

from index_jobs.gallery.storage import WHOLE_FILE, ImageAccess


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
