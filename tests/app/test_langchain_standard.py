"""LangChain's own tests of retrievers, from the package langchain-tests, which CI has not.

docs/how-to/connect-other-tools.md tells how to run them: the package brings six plugins of pytest.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dcar_client import Client

from tests.support.service import serving

suite = pytest.importorskip("langchain_tests.integration_tests", reason="needs langchain-tests")


@pytest.fixture(autouse=True, scope="module")
def _service(built_index: Path) -> Iterator[None]:
    with serving(built_index) as (_, port), Client(f"http://127.0.0.1:{port}") as client:
        TestDcarRetriever.client = client
        yield


class TestDcarRetriever(suite.RetrieversIntegrationTests):  # type: ignore[name-defined]
    client: Client

    @property
    def retriever_constructor(self) -> Any:
        from dcar_client.langchain import DcarRetriever

        return DcarRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"client": self.client}

    @property
    def retriever_query_example(self) -> str:
        return "a red circle"
