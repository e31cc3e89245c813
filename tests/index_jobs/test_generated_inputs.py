"""Generated filters and lists are applied, or refused with the error for bad input."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcar_core.util.errors import DataError
from index_jobs.gallery.scan import scan
from index_jobs.index.filters import FilterError, match_rows
from index_jobs.index.index_version import IndexVersion
from index_jobs.index.versions import open_current

bounded = settings(
    max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["red", "a"])
conditions = st.recursive(
    values | st.lists(values, max_size=5),
    lambda inner: st.dictionaries(
        st.sampled_from(["in", "not", "contains", "gt", "gte", "lt", "lte"]) | st.text(max_size=3), inner, max_size=3
    ),
    max_leaves=8,
)
fields = st.sampled_from(["id", "caption", "category", "color", "file_name"]) | st.text(max_size=5)
filters = st.recursive(
    st.dictionaries(fields, conditions, max_size=3),
    lambda inner: st.fixed_dictionaries({"$or": st.lists(inner, max_size=3) | values}),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def artifact(published: Path) -> IndexVersion:
    return open_current(published)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # hypothesis warns about itself
def test_generated_filters_are_applied_or_refused(artifact: IndexVersion) -> None:
    @bounded
    @given(filters)
    def check(filter: dict[str, Any]) -> None:
        try:
            mask = match_rows(artifact, filter)
        except FilterError:
            return
        assert mask.shape == (artifact.rows,)
        assert not (mask & ~artifact.live).any()
        if set(filter) <= {"id", "caption", "category"} and len(filter) == 1:
            ((field, condition),) = filter.items()
            assert (match_rows(artifact, {field: {"not": condition}}) == (artifact.live & ~mask)).all()

    check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_generated_lists_are_read_or_refused(suffix: str, tmp_path: Path) -> None:
    names = st.sampled_from(["path", "image", "id", "caption", "captions", "category", "price"]) | st.text(max_size=5)
    cells = st.recursive(values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=2))
    row = st.dictionaries(names, cells, max_size=4).map(lambda each: json.dumps(each).encode())
    table = st.lists(st.text('ab,"\n;\t1é', max_size=12).map(str.encode), max_size=5)
    lines = st.lists(row | st.binary(max_size=30), max_size=5) if suffix == ".jsonl" else table

    @bounded
    @given(lines.map(b"\n".join), st.sampled_from([b"", b"path,caption\n", b"PAR1", b"\xef\xbb\xbf"]))
    def check(content: bytes, head: bytes) -> None:
        (tmp_path / f"list{suffix}").write_bytes(head + content)
        with suppress(DataError):
            assert len(scan(tmp_path / f"list{suffix}")) > 0

    check()
