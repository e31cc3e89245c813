"""An index in an object store: S3, Google Cloud Storage and Azure, through obstore."""

import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from dcar_core.util.errors import ArtifactError, StoreUnavailableError, is_panic
from index_jobs.index.manifest import CURRENT, FileInfo
from index_jobs.index.storage import Storage, Stored

PART_BYTES, _PARTS = 8 * 2**20, 8  # of a blob; this many are fetched at a time
_MAX_PARTS = 5_000  # of an upload; stores allow 10,000
_UPLOADS = 4  # parts of a blob that are sent at a time; each may take as long as a silent store is waited for
CLIENT: Any = {
    "connect_timeout": "5s",
    "read_timeout": "60s",  # of a silent store
    "timeout": "1h",  # of a slow line
    "allow_http": True,  # of an endpoint that is configured so
}
RETRIES: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}


class ObjectStore(Storage):
    """An index at a URL. Writers share no lock: CURRENT is replaced if it is unchanged (If-Match)."""

    def __init__(self, url: str) -> None:
        from obstore.store import from_url

        self.name = url
        with self._report():
            self.objects: Any = from_url(url, client_options=CLIENT, retry_config=RETRIES)

    def read(self, key: str) -> bytes | None:
        return self._find(key)[0]

    def create(self, key: str, data: bytes) -> None:
        self._write(key, data, "create")

    def swap(self, before: bytes | None, data: bytes) -> None:
        found, mode = self._find(CURRENT)
        if found != before:
            raise self.lost_race()
        self._write(CURRENT, data, mode)

    def put(self, info: FileInfo, parts: Iterable[bytes]) -> None:
        size = max(PART_BYTES, info.size // _MAX_PARTS)
        content = parts if info.size > size else b"".join(parts)
        with self._report():
            self.objects.put(info.key, content, chunk_size=size, max_concurrency=_UPLOADS)

    def parts(self, info: FileInfo) -> Iterator[bytes]:
        def read(start: int) -> Any:
            return self.objects.get_range(info.key, start=start, length=min(PART_BYTES, info.size - start))

        with self._report(), ThreadPoolExecutor(_PARTS) as pool:
            if info.size > PART_BYTES and self.objects.head(info.key)["size"] < info.size:
                return  # there are no parts beyond the end
            for first in range(0, info.size, _PARTS * PART_BYTES):
                last = min(info.size, first + _PARTS * PART_BYTES)
                yield from pool.map(read, range(first, last, PART_BYTES))

    def entries(self, folder: str) -> dict[str, Stored]:
        with self._report():
            found = [each for chunk in self.objects.list(f"{folder}/") for each in chunk]
        entries = [Stored(each["size"], each["last_modified"].timestamp()) for each in found]
        return {each["path"].rpartition("/")[2]: entry for each, entry in zip(found, entries, strict=True)}

    def delete(self, keys: Collection[str]) -> None:
        with self._report():
            self.objects.delete([*keys])

    def _find(self, key: str) -> tuple[bytes | None, Any]:
        """Return an object, and the condition under which `_write` replaces it."""
        with self._report():
            try:
                found = self.objects.get(key)
                state = {name: found.meta.get(name) for name in ("e_tag", "version")}
                return bytes(found.bytes()), {name: value for name, value in state.items() if value}
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None, "create"

    def _write(self, key: str, data: bytes, mode: Any) -> None:
        """Write an object on a condition. Raise LockedError if it does not hold.

        A store that writes but does not respond refuses the next attempt, so what it has then decides.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        with self._report():
            try:
                self.objects.put(key, data, mode=mode)
            except BaseError as error:
                with suppress(BaseError, FileNotFoundError):
                    if bytes(self.objects.get(key).bytes()) == data:
                        return
                if isinstance(error, (AlreadyExistsError, PreconditionError)):
                    raise self.lost_race() from error
                raise

    @contextmanager
    def _report(self) -> Iterator[None]:
        """Raise ArtifactError, one line for people, in place of an error of the store."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.name} lacks an object: {_first_line(error)}") from error
        except BaseError as error:
            raise StoreUnavailableError(f"{self.name} is not available: {_first_line(error)}") from error
        except BaseException as error:
            if not is_panic(error):
                raise
            reason = f"{error}; is the endpoint in the environment a URL?"
            raise StoreUnavailableError(f"{self.name} is not available: {reason}") from error


def _first_line(error: Exception) -> str:
    """Return what a store has responded, without the times of attempts, which differ each time."""
    line = str(error).partition("\n")[0].rpartition(" - ")[2].partition(": <?xml")[0][:300]
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    return f"{line} ({code[1]})" if code else line
