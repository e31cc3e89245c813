"""Indexes in object storage: S3, Google Cloud Storage and Azure, through obstore.

URL/CURRENT                      the version that is served, its manifest's sha256, and the numbers of versions that its
                                 publication removes; replaced if unchanged (If-Match)
URL/versions/<n>/manifest.json   created if there is none (If-None-Match: *), after the blobs that it names
URL/blobs/<sha256>               the contents of files, which versions share

- A machine keeps a mirror: an index directory in its cache. Jobs and services run on it as on any other index; they
  `pull` before, and a job pushes what it publishes.
- Writers share no lock. A writer whose base has been replaced meanwhile gets LockedError, and nothing of it is visible:
  the gate compared with the version that it replaces, and changes are made to it.
- CURRENT names a version as removed before its manifest is deleted, so no rollback can choose it meanwhile.
- A file appears in a mirror once its checksum has been compared, and CURRENT once the version is complete. A killed
  pull continues, and a corrupted blob is never served.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from dcar_core.util.errors import ArtifactError, LockedError, is_panic
from dcar_core.util.errors import StoreUnavailableError as UnavailableError
from dcar_core.util.files import atomic_writer, sha256_of, write_bytes
from index_jobs.store.manifest import CURRENT, MANIFEST, VERSIONS, FileInfo, Manifest
from index_jobs.store.versions import (
    STAGING,
    current_version_or_none,
    list_versions,
    read_manifest,
    remove_directory,
    version_numbers,
    write_current,
)

logger = logging.getLogger(__name__)

_PULL_LOCK, _BLOBS = ".pull.lock", "blobs"
_HASH = re.compile("[0-9a-f]{64}")
_PART_BYTES, _PARTS = 8 * 2**20, 8  # of a blob; this many are fetched at a time
_MAX_PARTS = 5_000  # of an upload; stores allow 10,000
_KEPT = 3  # versions on the disk of a replica: those that were in use last
_GRACE = timedelta(days=1)  # younger blobs may belong to a version that is being published
_UPLOADS = 4  # parts of a blob that are sent at a time; each may take as long as a silent store is waited for
CLIENT: Any = {
    "connect_timeout": "5s",
    "read_timeout": "60s",  # of a silent store
    "timeout": "1h",  # of a slow line
    "allow_http": True,  # of an endpoint that is configured so
}
RETRIES: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}


class IndexStore:
    """An index in an object store, and its mirror on this disk. Several processes may share a mirror.

    All methods raise StoreUnavailableError if the store does not respond or refuses, and ArtifactError if an object is
    missing or corrupted.
    """

    def __init__(self, mirror: Path, url: str) -> None:
        from obstore.store import from_url

        self.mirror, self.url = mirror, url
        with self._report():
            self._store: Any = from_url(url, client_options=CLIENT, retry_config=RETRIES)
        self._current: tuple[bytes, dict[str, str]] | None = None  # as it was read last, and what identifies it
        self._pulled: bytes | None = None  # CURRENT of the last complete pull
        self._removed = set[int]()  # versions that CURRENT names as removed, and the store still has

    def pull(self, version: int | None = None, *, history: bool = False, files: bool = True) -> int | None:
        """Bring the published version to the mirror, or another one, and return its number.

        Args:
            history: bring the manifests of all versions as well, as jobs need, and remove versions that the store
                lacks. There may be no published version yet, or a broken one.
            files: bring more than manifests, and then CURRENT.
        """
        self.mirror.mkdir(exist_ok=True)
        with FileLock(self.mirror / _PULL_LOCK), self._report():
            if version is not None:
                self._pull_version(version)
                return version
            while True:
                text = self._read_current()
                number = int(text.split()[0]) if re.match(rb"\d{1,18} ", text) else None
                if text and text == self._pulled and not history:
                    return number
                if number is None and not history:
                    raise self._unpublished()
                if history:
                    self._pull_history()
                if not files:
                    return number
                try:
                    if number is not None:
                        self._pull_version(number)
                    break
                except (ArtifactError, FileNotFoundError) as error:
                    if history:
                        logger.warning("the published version cannot be used: %s", str(error).partition("\n")[0])
                        break
                    if self._read_current() == text:  # otherwise another writer has removed it meanwhile
                        raise
            self._write_current(number, trim=not history)
            self._pulled = text
            return number

    def repair(self, version: int) -> None:
        """Bring files of a pulled version anew that differ from their checksums."""
        with FileLock(self.mirror / _PULL_LOCK), self._report():
            for name, info in read_manifest(self.mirror, version).files.items():
                path = self._folder(version) / name
                if not _is_here(path, info) or sha256_of(path) != info.sha256:
                    logger.warning("%s is damaged: bringing it anew", path)
                    self._bring(path, info, None)

    def push(self, version: int, displaced: Collection[int]) -> None:
        """Publish a version of the mirror; those that it displaces are removed by `prune`.

        Raise LockedError if another writer has published since the last `pull`.
        """
        folder, key, recent = self._folder(version), _manifest_key(version), datetime.now(UTC) - _GRACE / 2
        manifest = Manifest.read(folder / MANIFEST)
        with self._report():
            stored = {each["path"]: each for chunk in self._store.list(f"{_BLOBS}/") for each in chunk}
            kept = self._hashes([manifest.replaced] if manifest.replaced else [])
            for name, info in {info.sha256: (name, info) for name, info in manifest.files.items()}.values():
                blob = stored.get(f"{_BLOBS}/{info.sha256}", {"size": -1})
                if blob["size"] != info.size or (info.sha256 not in kept and blob["last_modified"] < recent):
                    chunk_size = max(_PART_BYTES, info.size // _MAX_PARTS)
                    self._store.put(
                        f"{_BLOBS}/{info.sha256}", folder / name, chunk_size=chunk_size, max_concurrency=_UPLOADS
                    )
            self._put(key, (folder / MANIFEST).read_bytes(), "create")
            self._removed.update(displaced)
            try:
                self.point(version)
            except LockedError:
                self._store.delete(key)
                raise

    def point(self, version: int) -> None:
        """Let CURRENT name a version. Raise LockedError if it has been replaced since the last `pull`."""
        words = [version, sha256_of(self._folder(version) / MANIFEST), *sorted(self._removed)]
        text = f"{' '.join(map(str, words))}\n".encode()
        with self._report():
            stored = self._put(CURRENT, text, self._current[1] if self._current else "create")
            self._current = text, _identity(stored)

    def require_base(self) -> None:
        """Raise LockedError if another writer has published since the last `pull`."""
        before = self._current
        with self._report():
            if self._read_current() != (before[0] if before else b""):
                raise self._lost_race()

    def prune(self) -> None:
        """Delete removed versions, and old blobs that none has. A failure is logged, and left to the next writer."""
        try:
            with self._report():
                self._store.delete([_manifest_key(version) for version in self._removed])
                numbers, oldest = version_numbers(self.mirror), datetime.now(UTC) - _GRACE
                if len(list_versions(self.mirror)) < len(numbers):
                    return  # who knows which blobs an unreadable manifest names
                used = self._hashes(numbers)
                blobs = [each for chunk in self._store.list(f"{_BLOBS}/") for each in chunk]
                unused = [each for each in blobs if each["path"].rpartition("/")[2] not in used]
                self._store.delete([each["path"] for each in unused if each["last_modified"] < oldest])
        except ArtifactError as error:
            logger.warning("old versions are kept: %s", error)

    def verify(self) -> list[Manifest]:
        """Compare every blob of every version with its checksum, and return the manifests."""
        published, numbers = self.pull(history=True, files=False), version_numbers(self.mirror)
        if published not in numbers:
            raise self._unpublished()
        manifests = [read_manifest(self.mirror, number) for number in numbers]
        with self._report():
            for info in {info for manifest in manifests for info in manifest.files.values()}:
                for _ in self._read_blob(info):
                    pass
        return manifests

    def _folder(self, version: int) -> Path:
        return self.mirror / VERSIONS / str(version)

    def _read_current(self) -> bytes:
        """Return the contents of CURRENT, which are sent only if they have changed; none if there is no CURRENT."""
        from obstore.exceptions import NotModifiedError

        tag = self._current[1].get("e_tag") if self._current else None
        try:
            found = self._store.get(CURRENT, options={"if_none_match": tag} if tag else None)
            self._current = bytes(found.bytes()), _identity(found.meta)
        except NotModifiedError:
            pass
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            self._current = None
        return self._current[0] if self._current else b""

    def _pull_history(self) -> None:
        folders = self._store.list_with_delimiter(f"{VERSIONS}/")["common_prefixes"]
        stored = {int(name) for name in (folder.rpartition("/")[2] for folder in folders) if name.isdigit()}
        words = self._current[0].split() if self._current else []
        self._removed = stored & {int(word) for word in words[2:] if word.isdigit()}
        stored -= self._removed
        for number in set(version_numbers(self.mirror)) - stored:
            remove_directory(self.mirror, self._folder(number))
        for number in sorted(stored):
            try:
                self._pull_manifest(number)
            except FileNotFoundError:  # since the list, another writer has removed it, or lost its race
                remove_directory(self.mirror, self._folder(number))
        for manifest in list_versions(self.mirror):
            if manifest.spec.is_local:
                continue
            try:  # an engine drops what no version names
                self._pull_version(manifest.version, only=f"{manifest.spec.engine.partition('=')[0]}.json")
            except (ArtifactError, FileNotFoundError) as error:
                logger.warning("version %d cannot be used: %s", manifest.version, error)

    def _pull_manifest(self, version: int) -> Path:
        """Bring the manifest of a version, and return its folder; files of another version of that number go."""
        folder = self._folder(version)
        data, path = bytes(self._store.get(_manifest_key(version)).bytes()), folder / MANIFEST
        if path.exists() and path.read_bytes() != data:
            remove_directory(self.mirror, folder)
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)
        return folder

    def _pull_version(self, version: int, only: str = "") -> None:
        """Bring the files of a version. only: those of this name, in any of its folders."""
        folder = self._pull_manifest(version)
        here = {
            info.sha256: self._folder(manifest.version) / name
            for manifest in list_versions(self.mirror)
            for name, info in manifest.files.items()
            if _is_inside(name) and _is_here(self._folder(manifest.version) / name, info)
        }
        for name, info in Manifest.read(folder / MANIFEST).files.items():
            if not _is_inside(name) or not _HASH.fullmatch(info.sha256):
                raise ArtifactError(f"{self.url} is corrupted: version {version} names the file {name!r}")
            path = folder / name
            if only in ("", path.name) and not _is_here(path, info):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._bring(path, info, here.get(info.sha256))
        if not only:
            os.utime(folder)

    def _bring(self, path: Path, info: FileInfo, same: Path | None) -> None:
        """Make a file of a link to the same contents, or of a blob."""
        with suppress(OSError):  # no hard links here, or it has just been removed
            if same is not None:
                os.link(same, path)
                return
        with atomic_writer(path) as file:
            file.writelines(self._read_blob(info))

    def _read_blob(self, info: FileInfo) -> Iterator[Any]:
        """Yield a blob in parts, several of which are fetched at once. Raise ArtifactError at its end if it differs."""
        key, digest = f"{_BLOBS}/{info.sha256}", hashlib.sha256()
        is_whole = info.size <= _PART_BYTES or self._store.head(key)["size"] == info.size  # no part is beyond the end

        def read(start: int) -> Any:
            return self._store.get_range(key, start=start, length=min(_PART_BYTES, info.size - start))

        with ThreadPoolExecutor(_PARTS) as pool:
            for first in range(0, info.size if is_whole else 0, _PARTS * _PART_BYTES):
                for part in pool.map(read, range(first, min(info.size, first + _PARTS * _PART_BYTES), _PART_BYTES)):
                    digest.update(part)
                    yield part
        if digest.hexdigest() != info.sha256:
            raise ArtifactError(
                f"{self.url}/{key} is corrupted: its checksum differs; roll back, or remove it and publish again"
            )

    def _write_current(self, version: int | None, *, trim: bool) -> None:
        if version is None:
            (self.mirror / CURRENT).unlink(missing_ok=True)
            return
        if current_version_or_none(self.mirror) != version:
            write_current(self.mirror, version)
        folders = [self._folder(number) for number in version_numbers(self.mirror)]
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime)[: -_KEPT if trim else 0]:
            remove_directory(self.mirror, folder)
        for leftover in (self.mirror / VERSIONS).glob(f"{STAGING}*-*"):  # of a killed removal
            shutil.rmtree(leftover, ignore_errors=True)

    def _hashes(self, versions: Collection[int]) -> set[str]:
        """Return the blobs of some versions of the mirror."""
        manifests = (each for each in list_versions(self.mirror) if each.version in versions)
        return {info.sha256 for manifest in manifests for info in manifest.files.values()}

    def _put(self, key: str, data: bytes, mode: Any) -> Mapping[str, Any]:
        """Write an object on a condition, and return what identifies it. Raise LockedError if it does not hold.

        A store that writes but does not respond refuses the next attempt, so what it has then decides.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            stored: Mapping[str, Any] = self._store.put(key, data, mode=mode)
        except BaseError as error:
            with suppress(BaseError, FileNotFoundError):
                found = self._store.get(key)
                if bytes(found.bytes()) == data:
                    return dict(found.meta)
            if isinstance(error, (AlreadyExistsError, PreconditionError)):
                raise self._lost_race() from error
            raise
        return stored

    def _unpublished(self) -> ArtifactError:
        command = "make one with `dcar index build`, or roll back to one of `dcar index list`"
        return ArtifactError(f"{self.url} holds no published index; {command}")

    def _lost_race(self) -> LockedError:
        return LockedError(f"another job has published to {self.url} meanwhile; run the same command again")

    @contextmanager
    def _report(self) -> Iterator[None]:
        """Raise ArtifactError, one line for people, in place of an error of the store."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.url} lacks an object: {_first_line(error)}") from error
        except BaseError as error:
            raise UnavailableError(f"{self.url} is not available: {_first_line(error)}") from error
        except BaseException as error:
            if not is_panic(error):
                raise
            reason = f"{error}; is the endpoint in the environment a URL?"
            raise UnavailableError(f"{self.url} is not available: {reason}") from error


def _manifest_key(version: int) -> str:
    return f"{VERSIONS}/{version}/{MANIFEST}"


def _is_inside(name: str) -> bool:
    """Return whether a name that a manifest gives to a file stays in the folder of its version."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _is_here(path: Path, info: FileInfo) -> bool:
    """Return whether a file is on this disk with its size; `repair` compares checksums."""
    return path.is_file() and path.stat().st_size == info.size


def _identity(meta: Mapping[str, Any]) -> dict[str, str]:
    """Return what identifies the state of an object, for a conditional replacement; None is not accepted there."""
    return {name: meta[name] for name in ("e_tag", "version") if meta.get(name)}


def _first_line(error: Exception) -> str:
    """Return what a store has responded, without the times of attempts, which differ each time."""
    line = str(error).partition("\n")[0].rpartition(" - ")[2].partition(": <?xml")[0][:300]
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    return f"{line} ({code[1]})" if code else line
