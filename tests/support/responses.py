"""Checks of responses, and metrics read from them."""

from typing import Any

import httpx
from dcar_client.models import ProblemResponse
from prometheus_client.parser import text_string_to_metric_families


def assert_problem(
    answer: httpx.Response,
    status: int,
    field: str | None = None,
) -> dict[str, Any]:
    """Assert that the response is a problem with this status that names this field;
    return its body.
    """
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    body: dict[str, Any] = answer.json()
    ProblemResponse.model_validate(body, strict=True)
    assert body["status"] == status
    assert body["detail"]
    if field is not None:
        assert field in [error["field"] for error in body["errors"]]
    return body


async def scrape(
    client: httpx.AsyncClient,
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the samples of /metrics by name and sorted labels."""
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
