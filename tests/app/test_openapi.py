"""The OpenAPI document, and the service against it: schemathesis generates valid and
invalid requests from it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.parts import needs
from tests.support.service import ADMIN, bearer, serving


@pytest.fixture(scope="module")
def url(built_index: Path) -> Iterator[str]:
    with serving(built_index, admin_key=ADMIN, cache_size=1000) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, each)
        for path, methods in document["paths"].items()
        for method, each in methods.items()
    ]


def test_every_operation_documents_its_body_and_its_errors(
    document: dict[str, Any],
) -> None:
    schemas = document["components"]["schemas"]
    for path, method, operation in operations(document):
        assert operation["summary"], path
        ((media_type, error),) = operation["responses"]["default"]["content"].items()
        assert media_type == "application/problem+json"
        assert error["schema"]["$ref"].rpartition("/")[2] == "ProblemResponse"
        if method in ("post", "put", "patch") and "requestBody" in operation:
            (body,) = operation["requestBody"]["content"].values()
            assert schemas[body["schema"]["$ref"].rpartition("/")[2]]["properties"], (
                path
            )
    assert schemas["ImageForm"]["properties"]["file"]["format"] == "binary"
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert set(document["components"]["securitySchemes"]) == {"key", "admin"}


@needs("time")
# schemathesis and hypothesis warn about themselves
@pytest.mark.filterwarnings("ignore")
def test_generated_requests_get_documented_responses(url: str) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]
    tried = set[str]()
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        if operation.path.startswith("/collections/{collection}/"):
            continue  # the same functions answer
        for mode in (
            schemathesis.GenerationMode.POSITIVE,
            schemathesis.GenerationMode.NEGATIVE,
        ):

            @settings(
                max_examples=5,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                response = case.call(base_url=url, headers=bearer(ADMIN))
                case.validate_response(response, checks=checks)

            try:
                check()
            except Exception as error:
                if "Unsatisfiable" in type(error).__name__:
                    continue  # an operation without parameters has no invalid requests
                if str(error).startswith("Unsupported type: 'Binary'"):
                    # schemathesis sometimes fails to draw an invalid upload, before it
                    # sends anything
                    continue
                raise
            tried.add(operation.label)
    assert "POST /search/text" in tried
    assert len(tried) > 6
