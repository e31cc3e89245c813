"""The OpenAPI document: bodies, errors and keys that FastAPI cannot see."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.service import ADMIN, serving


@pytest.fixture(scope="module")
def url(built_index: Path) -> Iterator[str]:
    with serving(built_index, admin_key=ADMIN, cache_size=1000) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, each) for path, methods in document["paths"].items() for method, each in methods.items()]


def test_every_operation_documents_its_body_and_its_errors(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for path, method, operation in operations(document):
        assert operation["summary"], path
        ((media_type, error),) = operation["responses"]["default"]["content"].items()
        assert (media_type, error["schema"]["$ref"].rpartition("/")[2]) == (
            "application/problem+json",
            "ProblemResponse",
        )
        if method in ("post", "put", "patch") and "requestBody" in operation:
            (body,) = operation["requestBody"]["content"].values()
            assert schemas[body["schema"]["$ref"].rpartition("/")[2]]["properties"], path
    assert schemas["ImageForm"]["properties"]["file"]["format"] == "binary"
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert set(document["components"]["securitySchemes"]) == {"key", "admin"}
