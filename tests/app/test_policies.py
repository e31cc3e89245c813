"""Policies: every route declares what it needs, and nothing else is reachable."""

from pathlib import Path

from app.core.settings import Settings
from app.http.access import Policy
from app.main import create_app
from tests.support.responses import assert_problem
from tests.support.service import ALICE, KEYS, bearer, opened

PUBLIC = {"/", "/docs", "/openapi.json", "/favicon.ico", "/healthz", "/readyz", "/ui/insights", "/ui/{name}"}


def test_every_route_has_a_policy_and_few_are_open(tmp_path: Path) -> None:
    app = create_app(Settings(index=tmp_path))
    policies: dict[tuple[str, str], Policy] = {
        (route.path, method): route.policy  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert {path for (path, _), policy in policies.items() if policy.access == "open"} == PUBLIC
    changes = [policy for (_, method), policy in policies.items() if method in ("PUT", "DELETE", "PATCH")]
    assert {policy.access for policy in changes} == {"write"}
    private = {path for (path, _), policy in policies.items() if policy.is_private and path not in PUBLIC}
    assert all(path.startswith(("/ui/", "/collections/{collection}/ui/")) for path in private)


async def test_a_route_without_a_policy_is_not_reachable(built_index: Path) -> None:
    async with opened(built_index, **KEYS) as client:

        @client.app.get("/bare")
        async def bare() -> dict[str, str]:
            return {"secret": "shown"}

        assert_problem(await client.get("/bare"), 401, "Authorization")
        response = await client.get("/bare", headers=bearer(ALICE))
        assert_problem(response, 404)
        assert "nothing at /bare" in response.json()["detail"]
