"""Requests that change items and collections, and the ends of their jobs."""

import base64
from typing import Any

import httpx

from tests.support.images import png
from tests.support.service import ADMIN, bearer, until

WRITES: dict[str, Any] = {"writes": True, "admin_key": ADMIN}
ADMINS = bearer(ADMIN)
JSON = {"Content-Type": "application/json"}


def item(item_id: str, color: str = "pink", **fields: Any) -> dict[str, Any]:
    return {
        "id": item_id,
        "image": base64.b64encode(png(color)).decode(),
        **fields,
    }


async def put(
    client: httpx.AsyncClient,
    *items: dict[str, Any],
    path: str = "/items",
    **options: Any,
) -> httpx.Response:
    return await client.put(
        path,
        json={"items": items},
        headers=options.pop("headers", ADMINS),
    )


async def delete(
    client: httpx.AsyncClient,
    *ids: str,
    path: str = "/items",
    **options: Any,
) -> httpx.Response:
    return await client.request(
        "DELETE",
        path,
        json={"ids": ids},
        headers=options.pop("headers", ADMINS),
    )


async def ended(client: httpx.AsyncClient, response: httpx.Response) -> dict[str, Any]:
    """Return the job of a response at its end."""
    assert response.status_code == 202, response.text
    job: dict[str, Any] = {}

    async def is_over() -> bool:
        job.update(
            (await client.get(response.headers["location"], headers=ADMINS)).json()
        )
        return job["status"] in ("done", "failed")

    await until(is_over)
    return job
