"""What a search must return: computed with NumPy from the vectors, texts and metadata
of all rows of an index.
"""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from app.search.query import Query
from app.search.served_version import ServedVersion
from index_jobs.index.lexical import DEFAULT_WEIGHT, text_bonus

CUTOFFS = ("cutoff", "image_cutoff")
CLOSE = 2e-5  # scores are rounded, and sums of floats depend on their order


def meets(value: Any, condition: Any) -> bool:
    """Return True if a value, or a member of a list, meets a condition of a filter."""
    members = value if isinstance(value, list) else [] if value is None else [value]
    if isinstance(condition, list):
        return any(meets(value, each) for each in condition)
    if not isinstance(condition, dict):
        return value is None if condition is None else condition in members
    tests = {
        "in": lambda operand: meets(value, operand),
        "not": lambda operand: not meets(value, operand),
        "contains": lambda operand: any(
            operand.lower() in member.lower() for member in members
        ),
        "gt": lambda operand: any(member > operand for member in members),
        "gte": lambda operand: any(member >= operand for member in members),
        "lt": lambda operand: any(member < operand for member in members),
        "lte": lambda operand: any(member <= operand for member in members),
    }
    return all(tests[name](operand) for name, operand in condition.items())


def fulfils(record: dict[str, Any], filter: dict[str, Any]) -> bool:
    return all(
        (
            any(fulfils(record, each) for each in condition)
            if name == "$or"
            else meets(record.get(name), condition)
        )
        for name, condition in filter.items()
    )


def first_of_each(rows: Iterable[int], owners: list[Any]) -> list[int]:
    """Return the first row of each owner; a row without one stands alone."""
    first: dict[Any, int] = {}
    for row in rows:
        first.setdefault(("row", row) if owners[row] is None else owners[row], row)
    return list(first.values())


def plain_sort(rows: Iterable[int], values: list[Any], descending: bool) -> list[int]:
    """Return rows in the order of their values regardless of case; missing and empty
    ones last.
    """
    rows = list(rows)
    present = [row for row in rows if values[row] not in (None, "")]
    key = {
        row: values[row].lower() if isinstance(values[row], str) else values[row]
        for row in present
    }
    return sorted(present, key=key.__getitem__, reverse=descending) + [
        row for row in rows if row not in key
    ]


def fold_row_by_row(
    vectors: np.ndarray,
    rows: list[int],
    fold: float,
) -> dict[int, list[int]]:
    """Fold each row into the most similar row that is shown, or show it; return the
    folded rows of each shown one.
    """
    shown: dict[int, list[int]] = {}
    for row in rows:
        alike = vectors[[*shown]] @ vectors[row] if shown else np.empty(0)
        if len(alike) and alike.max() >= fold - 1e-6:
            shown[[*shown][int(alike.argmax())]].append(row)
        else:
            shown[row] = []
    return shown


def gap(values: np.ndarray, place: int) -> float:
    """Return a number between two values that differ, those at `place` in descending
    order or after it.
    """
    values = np.sort(values)[::-1]
    while values[place - 1] - values[place] < 4 * CLOSE:
        place += 1
    return round(float(values[place - 1] + values[place]) / 2, 6)


class Oracle:
    """All rows of a version, and plain computations over them."""

    def __init__(self, served: ServedVersion) -> None:
        self.served = served
        self.index = served.index
        self.encoder = served.encoder
        self.live: list[int] = np.flatnonzero(self.index.live).tolist()
        self.vectors = np.zeros((self.index.rows, self.encoder.dim), np.float32)
        self.vectors[self.live] = self.index.vectors(np.array(self.live))
        self.items = {row: self.index.item(row) for row in self.live}
        self.row_of = {item.id: row for row, item in self.items.items()}
        self.records = {
            row: (
                {
                    "id": item.id,
                    **{
                        name: text
                        for name in ("caption", "category")
                        if (text := getattr(item, name))
                    },
                }
                | item.metadata
            )
            for row, item in self.items.items()
        }

    def values(self, name: str) -> list[Any]:
        return [self.records.get(row, {}).get(name) for row in range(self.index.rows)]

    def allowed(self, filter: dict[str, Any] | None) -> list[int]:
        return [row for row in self.live if fulfils(self.records[row], filter or {})]

    def listed(
        self,
        filter: dict[str, Any] | None = None,
        sort: str = "",
        group_by: str | None = None,
    ) -> list[str]:
        """Return the ids of a listing."""
        rows = self.allowed(filter)
        if sort:
            rows = plain_sort(
                rows,
                self.values(sort.removeprefix("-")),
                sort.startswith("-"),
            )
        if group_by is None:
            group_by = self.index.manifest.spec.group_field
        return [
            self.items[row].id
            for row in (
                first_of_each(rows, self.values(group_by)) if group_by else rows
            )
        ]

    def vector(self, query: Query, image: bytes | None) -> np.ndarray:
        weights = query.weights
        total = np.zeros(self.vectors.shape[1])
        for weight, text in (
            (weights.text, query.query),
            (-weights.without, query.without),
        ):
            total += weight * self.encoder.encode_text([text])[0] if text else 0
        for weight, ids in (
            (weights.more, query.more_like),
            (-weights.less, query.less_like),
        ):
            total += (
                weight * self.vectors[[self.row_of[each] for each in ids]].mean(0)
                if ids
                else 0
            )
        if image is not None:
            picture = Image.open(io.BytesIO(image)).convert("RGB")
            if query.crop is not None:
                x, y, width, height = (
                    np.multiply(query.crop.box, picture.size * 2).round().tolist()
                )
                picture = picture.crop((x, y, x + width, y + height))
            total += weights.image * self.encoder.encode_images([picture])[0]
        return np.asarray(total / np.linalg.norm(total), np.float32)

    def cutoff(self, query: Query, image: bytes | None) -> dict[str, Any]:
        """Return the calibration for a query by a text or an image alone; nothing for
        any other.
        """
        if (
            query.without
            or query.more_like
            or query.less_like
            or (query.query and image)
        ):
            return {}
        return self.index.manifest.image_cutoff if image else self.index.manifest.cutoff

    def level(
        self,
        query: Query,
        best: float,
        image: bytes | None,
    ) -> tuple[float, float, float] | None:
        """Return the scores of a likely and of a possible match, and the text score of
        a likely one.
        """
        cutoff = self.cutoff(query, image)
        if not cutoff:
            return None
        if image:
            return cutoff["strong_score"], cutoff["min_score"], 0.6
        is_familiar = self.index.lexical.known_share(query.query) >= 0.5
        if best >= cutoff["strong_score"]:
            return cutoff["min_score"], cutoff["min_score"], 0.6
        return (
            cutoff["min_score" if is_familiar else "strong_score"],
            cutoff["min_score"],
            0.6 if is_familiar else 0.4,
        )

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a row of a table, with numbers in place of words, and
        calibrate the index as it says.

        `"min_score": "top 9"` is a score that nine rows reach, `"fold": "share 0.1"` a
        similarity that a tenth of all pairs reach. `"cutoff": (9, 2)` calibrates the
        index: nine rows are likely, and two of them strong matches.
        """
        options = {
            name: value
            for name, value in row.items()
            if name not in ("cutoff", "min_score", "fold")
        }
        query = Query(
            **{name: value for name, value in options.items() if name != "image"}
        )
        cosines = self.vectors[self.live] @ self.vector(query, options.get("image"))
        likely, strong = row.get("cutoff", (0, 0))
        scores = {
            "min_score": gap(cosines, likely),
            "strong_score": gap(cosines, strong) if strong else 1.0,
        }
        kinds = {
            name: scores if likely and ("image" in row) == ("image" in name) else {}
            for name in CUTOFFS
        }
        self.change_manifest(**kinds)
        for name in row.keys() & {"min_score", "fold"}:
            kind, _, count = str(row[name]).partition(" ")
            if kind == "share":
                pairs = (self.vectors[self.live] @ self.vectors[self.live].T)[
                    np.triu_indices(len(self.live), 1)
                ]
                options[name] = round(float(np.quantile(pairs, 1 - float(count))), 5)
            else:
                options[name] = gap(cosines, int(count)) if kind == "top" else row[name]
        return options

    def change_manifest(self, **changes: Any) -> None:
        """Change the opened version, and forget its cached pages."""
        self.index.manifest = replace(self.index.manifest, **changes)
        self.served.pages.clear()

    def check(
        self,
        body: dict[str, Any],
        image: bytes | None = None,
        **options: Any,
    ) -> None:
        """Assert that the body of a search is what its options ask for."""
        query = Query(**options)
        manifest = self.index.manifest
        vector = self.vector(query, image)
        cosines = self.vectors @ vector
        weight = DEFAULT_WEIGHT if query.hybrid is True else float(query.hybrid)
        if weight:
            texts = self.index.lexical.score(query.query, np.arange(self.index.rows))
        else:
            texts = 0 * cosines
        relevance = (
            cosines
            + (text_bonus(self.index.sample_vectors, vector, weight) if weight else 0)
            * texts
        )
        if query.group_by is None and query.fold is None:
            group_by = manifest.spec.group_field
        else:
            group_by = query.group_by or ""
        groups = self.values(group_by)
        values = self.values(query.sort.removeprefix("-"))
        owners = [
            ("row", row) if value is None else value for row, value in enumerate(groups)
        ]
        left_out = {
            owners[self.row_of[each]] for each in (*query.more_like, *query.less_like)
        }

        allowed = self.allowed(query.filter)
        scores = {row: round(float(cosines[row]), 6) for row in allowed}
        levels = self.level(query, max(scores.values(), default=np.inf), image)
        if query.min_score == "auto":
            min_score = self.cutoff(query, image)["min_score"]
        else:
            min_score = query.min_score
        lowest = -1.1 if min_score is None else min_score
        contained = np.inf
        if query.sort and min_score is None:
            lowest = levels[1] if levels else np.inf
            known = self.index.lexical.known_share(query.query) if weight else 1
            if weight:
                contained = levels[2] if levels else 0.6 if known >= 0.5 else 0.4
            else:
                contained = np.inf
        fitting = [row for row in allowed if owners[row] not in left_out]
        fitting = [
            row for row in fitting if scores[row] >= lowest or texts[row] >= contained
        ]
        order = sorted(fitting, key=lambda row: (-relevance[row], row))
        if query.sort:
            order = plain_sort(order, values, query.sort.startswith("-"))
        order = first_of_each(order, owners)
        if query.fold is not None:
            near = fold_row_by_row(self.vectors, order, query.fold)
        else:
            near = {}
        shown = [*near] if near else order
        end = query.offset + query.k
        if not query.sort:
            levels = self.level(
                query,
                max((scores[row] for row in shown[: end + 1]), default=np.inf),
                image,
            )

        results = body["results"]
        page = shown[query.offset : end]
        rows = [self.row_of[each["id"]] for each in results]
        assert len({owners[row] for row in rows}) == len(rows) == len(page)
        assert [str(values[row]).lower() for row in rows] == [
            str(values[row]).lower() for row in page
        ]
        np.testing.assert_allclose(relevance[rows], relevance[page], atol=CLOSE)
        assert [each["rank"] for each in results] == [
            *range(query.offset + 1, query.offset + len(page) + 1)
        ]
        for row, place, result in zip(rows, page, results, strict=True):
            item = self.items[row]
            assert result["caption"] == item.caption
            assert result["category"] == item.category
            assert abs(result["score"] - cosines[row]) < CLOSE
            assert (
                abs(result.get("text_score", -1) - (texts[row] if weight else -1))
                < CLOSE
            )
            if "*" in query.fields:
                wanted = item.metadata
            else:
                wanted = {
                    field: item.metadata[field]
                    for field in query.fields
                    if field in item.metadata
                }
            assert result.get("metadata") == (wanted if query.fields else None)
            assert result["level"] == self.level_of(levels, scores[row], texts[row])
            size = sum(owners[each] == owners[row] for each in allowed)
            assert result.get("group") == (
                {"value": groups[row], "count": size} if group_by else None
            )
            cluster: set[str] = (
                {self.items[each].id for each in (place, *near[place])} - {item.id}
                if near
                else set()
            )
            folded = {*result.get("folded", ())}
            assert (
                folded == cluster
                if query.sort or end > len(shown)
                else folded <= cluster
            )

        assert body.get("next_offset") == (end if len(shown) > end else None)
        assert body.get("min_score") == min_score
        assert body.get("count") == (len(order) if query.sort else None)
        assert body.get("cutoff") == (levels[0] if levels else None)
        judged = order if query.sort else shown[: end + 1]
        likely = [
            row
            for row in judged
            if self.level_of(levels, scores[row], texts[row]) == "likely"
        ]
        assert body["nothing_fits"] == (levels is not None and not likely)
        if query.sort:
            counted = fitting
        else:
            counted = [row for row in allowed if scores[row] >= lowest]
        for facet in query.facets:
            self.check_facet(body["facets"][facet], facet, counted, owners)
        assert (body.get("facets") or {}).keys() == {*query.facets}

    @staticmethod
    def level_of(
        levels: tuple[float, float, float] | None,
        score: float,
        text_score: float,
    ) -> str:
        if levels is not None and (score >= levels[0] or text_score >= levels[2]):
            return "likely"
        return "possible" if levels is None or score >= levels[1] else "unlikely"

    def check_facet(
        self,
        facet: list[dict[str, Any]],
        name: str,
        rows: list[int],
        owners: list[Any],
    ) -> None:
        values = self.values(name)
        pairs = set()
        for row in rows:
            value = values[row]
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    pairs.add((each, owners[row]))
        if any(isinstance(each["value"], dict) for each in facet):
            assert len({value for value, _ in pairs}) > 20
            found = [
                {owners[row] for row in rows if meets(values[row], each["value"])}
                for each in facet
            ]
            assert [each["count"] for each in facet] == [len(each) for each in found]
            assert set().union(*found) == {owner for _, owner in pairs}
        else:
            counter = Counter(value for value, _ in pairs)
            expected = sorted(
                counter.items(), key=lambda each: (-each[1], str(each[0]))
            )[:100]
            assert [(each["value"], each["count"]) for each in facet] == expected
