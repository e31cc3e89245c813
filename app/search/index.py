"""`Index`: one version of an index in this process, for scripts and for the command
line.

It takes the steps of every search one after the other: query, plan, vector, hits, page.
The service takes the same steps; it awaits the vector, and has a page made in a thread.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.core.settings import Settings
from app.search.concepts import TaughtConcept
from app.search.errors import InvalidQueryError
from app.search.query import Crop, Plan, Query, make_plan, query_vector, row_of
from app.search.results import SearchResponse, answer
from app.search.served_version import ServedVersion, load_served_version
from dcar_core.encoder.encoder import starts_quickly
from dcar_core.images import OpenedImage
from dcar_core.util.arrays import Floats
from dcar_core.util.errors import ImageError
from index_jobs.index.versions import open_current, open_version, published_index

_BATCH = 64  # texts that are encoded at a time


class Index:
    """One version of an index, with its model, opened in this process. Many threads may
    share it.
    """

    def __init__(self, served: ServedVersion, settings: Settings) -> None:
        self.served = served
        self._settings = settings

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        runtime: str = "",
        version: int | None = None,
    ) -> "Index":
        """Open a version of an index by its directory or URL. Raise DcarError if it or
        its checkpoint is broken.

        Args:
            runtime: see `Encoder.load`. Default: auto if it starts without PyTorch,
                else PyTorch.
            version: its number. Default: the current one.
        """
        index = published_index(path, version)
        if not runtime:
            if version is None:
                opened = open_current(index)
            else:
                opened = open_version(index, version)
            runtime = "auto" if starts_quickly(opened.checkpoint, device) else "torch"
        # not of the environment
        settings = Settings.model_construct(index=index, device=device, runtime=runtime)
        return cls(
            load_served_version(
                settings.index,
                settings,
                version=version,
                warm_up=False,
            ),
            settings,
        )

    def search(
        self,
        query: str = "",
        *,
        image: str | Path | bytes | None = None,
        **options: Any,
    ) -> SearchResponse:
        """Return the results of a text, an image, items of the gallery, or all of them,
        as the HTTP API does.

        Args:
            options: the other fields of `Query`: k, filter, more_like, without, hybrid,
                rerank, ...

        Raises:
            ImageError: the image cannot be read.
            SearchError: the search failed; an `InvalidQueryError` names the field.
        """
        started = time.perf_counter()
        checked = _validated({"query": query, **options})
        plan = make_plan(
            self.served,
            checked,
            self._settings,
            has_image=image is not None,
        )
        vectors = self._encode([text for _, text in plan.texts])
        vectors += [] if image is None else [self._encode_image(image, checked.crop)]
        return self._answer(plan, query_vector(self.served, plan, vectors), started)

    def search_each(
        self,
        queries: Sequence[str],
        **options: Any,
    ) -> Iterator[SearchResponse]:
        """Yield the results of each text, as `search` finds them; the texts are encoded
        in batches.
        """
        for start in range(0, len(queries), _BATCH):
            batch = [
                _validated({"query": query, **options})
                for query in queries[start : start + _BATCH]
            ]
            plans = [make_plan(self.served, query, self._settings) for query in batch]
            vectors = iter(
                self._encode([text for plan in plans for _, text in plan.texts])
            )
            for plan in plans:
                started = time.perf_counter()
                own = [next(vectors) for _ in plan.texts]
                yield self._answer(plan, query_vector(self.served, plan, own), started)

    def teach(self, name: str, ids: Sequence[str], **options: Any) -> TaughtConcept:
        """Let `@name` stand for items like these in queries. options: `kind` and
        `not_ids`; see `Concepts.teach`.
        """
        return self.served.concepts.teach(name, ids, **options)

    def metadata(self, item_id: str) -> dict[str, Any]:
        """Return the metadata of an item. Raise ItemNotFoundError if no item has this
        id.
        """
        return self.served.index.item(row_of(self.served, item_id)).metadata

    def _answer(self, plan: Plan, vector: Floats, started: float) -> SearchResponse:
        body, _ = answer(self.served, plan, vector)
        return {**body, "took_ms": round((time.perf_counter() - started) * 1000, 2)}

    def _encode(self, texts: Sequence[str]) -> list[Floats]:
        return list(self.served.encoder.encode_text(texts, max(1, len(texts))))

    def _encode_image(self, image: str | Path | bytes, crop: Crop | None) -> Floats:
        preprocess = self.served.preprocess
        try:
            opened = OpenedImage(
                image if isinstance(image, bytes) else Path(image).read_bytes()
            )
            pixels = preprocess.finish(
                preprocess.decoder(crop.box if crop else None)(opened)
            )
        except (OSError, ImageError) as error:
            if isinstance(image, bytes):
                raise
            raise ImageError(
                f"{image}: {error.strerror if isinstance(error, OSError) else error}"
            ) from error
        vector: Floats = self.served.encoder.encode_pixels(pixels[None])[0]
        return vector


def _validated(fields: dict[str, Any]) -> Query:
    try:
        return Query(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"]) or "query"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden" and fault["loc"] == (field,):
            message = (
                f"unknown option; there are: {', '.join(sorted(Query.model_fields))}"
            )
        raise InvalidQueryError(field, message) from None
