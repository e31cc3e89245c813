"""`Index`: a published index opened in this process, for scripts, notebooks and the command line."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.core.settings import Settings
from app.search.compute import Direct, finish
from app.search.engine import search
from app.search.errors import InvalidQueryError
from app.search.query import Query, SearchResults
from app.search.snapshots import Snapshot, open_snapshot
from dcar_core.serving import encoder_cache
from dcar_core.util.errors import ImageError
from index_jobs.store.versions import open_current


class Index:
    """One version of an index, with its model. Many threads may share it.

    Attributes:
        snapshot: the version; see `Snapshot`.
    """

    def __init__(self, snapshot: Snapshot, settings: Settings) -> None:
        self.snapshot = snapshot
        self._settings = settings

    @classmethod
    def open(cls, path: str | Path, *, device: str = "auto", runtime: str = "") -> "Index":
        """Open the current version of an index.

        Args:
            path: directory of the published index.
            device: auto, cpu, cuda, cuda:1 or mps.
            runtime: of the encoder; see `Encoder.load`. Default: the one that was measured as the fastest here, or
                PyTorch.

        Raises:
            DcarError: the index or its checkpoint is missing or broken.
        """
        if not runtime:
            artifact = open_current(Path(path))
            is_cached = encoder_cache.has_entry(artifact.checkpoint, artifact.manifest.fingerprint, device)
            runtime = "auto" if is_cached else "torch"
        settings = Settings.model_construct(index=Path(path), device=device, runtime=runtime)  # not of the environment
        return cls(open_snapshot(settings.index, settings), settings)

    def search(self, query: str = "", *, image: str | Path | bytes | None = None, **options: Any) -> SearchResults:
        """Return the matches of a text, an image, items of the gallery, or all of them.

        Args:
            query: what the image shows.
            image: an image file, or its bytes.
            options: the other fields of `Query`: k, filter, more_like, without, hybrid, rerank, ...

        Raises:
            ImageError: the image cannot be read.
            SearchError: the search failed; an `InvalidQueryError` names the field.
        """
        try:
            checked = Query(query=query, **options)
        except ValidationError as error:
            fault = error.errors()[0]
            field = ".".join(str(place) for place in fault["loc"]) or "query"
            raise InvalidQueryError(field, fault["msg"].removeprefix("Value error, ")) from None
        try:
            data = Path(image).read_bytes() if isinstance(image, str | Path) else image
            return finish(search(Direct(), self.snapshot, checked, data, self._settings))
        except (OSError, ImageError) as error:
            if isinstance(image, str | Path):
                reason = error.strerror if isinstance(error, OSError) else error
                raise ImageError(f"{image}: {reason}") from error
            raise
