"""A watched gallery: the index follows its files by the jobs of other updates.

- A notice of the file system is a reason to scan. What has changed is found by
  comparing scans, at the start with the index, so neither a lost notice nor a killed
  watch loses a change.
- A change is taken once two scans, SETTLE_S apart, agree on it: a file that is being
  copied waits. One that cannot be decoded is reported, and tried again when it changes.
- Everything that has changed meanwhile becomes one version. A renamed file is one
  removed and one added.
- A gallery that is missing, empty, or has lost too many images is taken for an
  unmounted disk: nothing is removed until it is back. The service reads the reason in
  the index. A file that is elsewhere in the gallery is not lost.
- Items that came from elsewhere, as over HTTP, are left alone.
"""

import contextlib
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import watchfiles

from dcar_core import Encoder
from dcar_core.util.errors import DataError, DcarError, GalleryShrunkError
from dcar_core.util.files import write_bytes
from index_jobs.encoding.encode import load_replicas
from index_jobs.gallery.locations import is_url, join_location
from index_jobs.gallery.metadata import GalleryMetadata
from index_jobs.gallery.scan import Gallery, scan
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.items import as_scanned
from index_jobs.index.manifest import BY_WATCH, WAITING
from index_jobs.index.versions import open_current
from index_jobs.jobs.update import add, live_gallery, read_failures, remove
from index_jobs.spec import KEEP_WRITES, BuildOptions

SETTLE_S = 0.5
# notices are collected until this long after the last one, or after the first
_QUIET_MS = 100
_BURST_MS = 2000
TICK_MS = 200  # between looks at what sends no notice
RETRY_S = 2.0
_FEW = 10  # images that may always go

# of an image: path, size, time of change, caption, category, metadata
_State = tuple[str, int, int, str, str, str]


def watch(index: Path, say: Callable[[str], object], **options: Any) -> None:
    """Keep an index as its gallery is, until SIGINT or SIGTERM, which end it between
    two jobs.

    Args:
        say: called with a line for each update, and for each reason to wait.
        options: keep (of changes), max_vanished, device and runtime of `BuildOptions`.

    Raises:
        DataError, ArtifactError: at the start, there is no index, or its gallery cannot
            be watched.
    """
    settings = BuildOptions.of(
        {"keep": KEEP_WRITES, "max_failed": 1.0, "progress": False, **options}
    )
    watched = _WatchedGallery(index, say, settings)
    parent = multiprocessing.parent_process()
    watched.open()  # what is missing now is a mistyped name, not a disk that comes back
    stop = threading.Event()
    reason = ""

    def end(*_: object) -> None:
        stop.set()
        # a second one does not wait
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    for reader in (scan, GalleryMetadata):
        logging.getLogger(reader.__module__).addFilter(_FirstWarnings())
    while not stop.is_set():
        try:
            folder = watched.open()
            is_due = True
            device = folder.stat().st_dev, folder.stat().st_ino
            for notices in watchfiles.watch(
                folder,
                watch_filter=None,
                debounce=_BURST_MS,
                step=_QUIET_MS,
                stop_event=stop,
                rust_timeout=TICK_MS,
                yield_on_timeout=True,
            ):
                now = folder.stat()
                if is_due or notices:
                    is_due = watched.update(stop)
                    reason = ""
                    (index / WAITING).unlink(missing_ok=True)
                if parent is not None and not parent.is_alive():
                    return
                # mounted anew; the former folder sends no notices
                if (now.st_dev, now.st_ino) != device:
                    break
        except (DcarError, OSError) as error:
            with contextlib.suppress(OSError):  # the disk may be full
                write_bytes(index / WAITING, str(error).encode(), shared=True)
            if str(error) != reason:
                say(f"nothing is removed while this lasts: {error}")
            reason = str(error)
            stop.wait(RETRY_S)


class _FirstWarnings(logging.Filter):
    """Let a warning pass once, and nothing below it, since every scan repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self._given = set[str]()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = record.levelno >= logging.WARNING and message not in self._given
        self._given.add(message)
        return is_new


class _WatchedGallery:
    """The gallery of an index, and the images in it that need no update: indexed, or
    known to be unusable.
    """

    def __init__(
        self,
        index: Path,
        say: Callable[[str], object],
        options: BuildOptions,
    ) -> None:
        self._index = index
        self._say = say
        self._options = options
        self._location = ""
        self._known = dict[str, _State]()
        self._replicas = list[Encoder]()

    def open(self) -> Path:
        """Return the folder to watch. Raise DataError if there is none."""
        manifest = open_current(self._index).manifest
        location = manifest.spec.gallery
        if manifest.roots or not manifest.root or is_url(manifest.root):
            raise DataError(
                "one gallery on this machine can be watched, not several or a URL, as"
                f" {location}"
            )
        if location != self._location:
            self._location = location
            self._known = {}
        return Path(manifest.root)

    def update(self, stop: threading.Event) -> bool:
        """Publish what has changed. Return True if images are still changing.

        Raises:
            GalleryShrunkError: too many images are gone; the others are published.
            DcarError: the gallery cannot be read, or nothing can be published now.
        """
        started = time.monotonic()
        before = _states(scan(self._location))
        self._known = known = self._known or _indexed_states(
            open_current(self._index), before
        )
        if before == known:
            return False
        # scans take a small part of a long copy's time
        stop.wait(max(SETTLE_S, 4 * (time.monotonic() - started)))
        gallery = scan(self._location)
        states = _states(gallery)
        gone = [
            item_id
            for item_id in known
            if item_id not in states and item_id not in before
        ]
        # others may have removed what is gone, and what is broken was never in it
        current = open_current(self._index)
        lost = _lost(
            [known[item_id] for item_id in gone if current.row_of(item_id) is not None],
            states.values(),
        )
        if is_shrunk := lost > max(_FEW, self._options.max_vanished * len(known)):
            gone = []
        changed = {
            key: state
            for key, state in states.items()
            if before.get(key) == state != known.get(key)
        }
        if changed or gone:
            counts = self._publish(
                gallery.filter(
                    pc.is_in(gallery.table["id"], pa.array([*changed], pa.string()))
                ),
                gone,
            )
            self._known = {
                key: state for key, state in known.items() if key not in gone
            } | changed
            if done := ", ".join(
                f"{count:,} {name}" for name, count in counts.items() if count
            ):
                manifest = open_current(self._index).manifest
                self._say(
                    f"{done}: version {manifest.version}, {manifest.count:,} images"
                )
        if is_shrunk:
            raise GalleryShrunkError(
                f"{lost:,} images of {self._location} are gone; mount or restore what"
                " is missing, or, if they are meant to be gone, run `dcar quickstart`"
                f" again, or `dcar index watch {self._index} --max-vanished 1`"
            )
        return self._known != states

    def _publish(self, changed: Gallery, gone: list[str]) -> dict[str, int]:
        """Publish a version, and return what it changes. Images that cannot be read are
        reported.
        """
        current = open_current(self._index)
        keep = self._options.keep
        # others could not be read
        gone = [item_id for item_id in gone if current.row_of(item_id) is not None]
        if len(changed):
            try:
                done = add(
                    self._index,
                    changed,
                    replace_existing=True,
                    removed_ids=gone,
                    replicas=self._encoders(),
                    keep=keep,
                    max_failed=1.0,
                    progress=False,
                    origin=BY_WATCH,
                )
                if done.failed:
                    failures = read_failures(open_current(self._index)).items()
                    self._say(
                        "left out until they change:"
                        f" {'; '.join(map(': '.join, failures))}"
                    )
                return {
                    "added": done.added - done.removed,
                    "changed": done.removed,
                    "removed": len(gone),
                }
            except DataError as error:
                # no image can be read, or a field has values of another type
                self._say(f"left out until they change: {error}")
        if gone:
            remove(self._index, gone, missing_ok=True, keep=keep, origin=BY_WATCH)
        return {"removed": len(gone)}

    def _encoders(self) -> list[Encoder]:
        current = open_current(self._index)
        if (
            not self._replicas
            or self._replicas[0].fingerprint != current.manifest.spec.fingerprint
        ):
            exact = current.manifest.spec.exact
            options = self._options
            self._replicas = load_replicas(
                current.checkpoint,
                options.device,
                exact=exact,
                runtime=options.spec.runtime,
            )
        return self._replicas


def _states(gallery: Gallery) -> dict[str, _State]:
    columns = ("id", "location", "size", "mtime_ns", "caption", "category", "metadata")
    rows = zip(*(gallery.table[name].to_pylist() for name in columns), strict=True)
    return {
        item_id: (join_location(gallery.root, location), *rest)
        for item_id, location, *rest in rows
    }


def _lost(gone: Iterable[_State], states: Iterable[_State]) -> int:
    """Count the files that are nowhere else: none has their size and time of change, or
    name where that is unknown.
    """
    elsewhere = {
        (size, kept)
        for path, size, mtime, *_ in states
        for kept in (mtime, path.rpartition("/")[2])
    }
    return sum(
        (size, mtime or path.rpartition("/")[2]) not in elsewhere
        for path, size, mtime, *_ in gone
    )


def _indexed_states(
    current: IndexVersion, states: dict[str, _State]
) -> dict[str, _State]:
    """Return the states of the gallery's images that an index has; states: those in the
    gallery.

    A file that is newer than the version has changed. Texts are compared unless
    metadata were changed in the index.
    """
    manifest = current.manifest
    indexed = dict[str, _State]()
    published = 10**9 * (1 + int(manifest.created_s or 0))  # it is in seconds
    for item_id, (path, size, _, *texts, metadata) in _states(
        live_gallery(current)
    ).items():
        now = states.get(item_id)
        texts += [as_scanned(metadata, now[-1]) if now else metadata]
        if path.startswith(f"{manifest.root}/") or (now and now[0] == path):
            mtime = now[2] if now and now[2] < published else 0
            indexed[item_id] = (
                path,
                size,
                mtime,
                *(now[3:] if now and manifest.changed else texts),
            )
        elif now:  # it was replaced from elsewhere
            indexed[item_id] = now
    return indexed
