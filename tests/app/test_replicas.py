"""Two services on one index, behind a real nginx with the configuration of the compose file, and with a real Redis."""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from fastapi import FastAPI

from index_jobs.index.publish import rollback
from tests.support.load import searching
from tests.support.nginx import behind_nginx
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.redis_server import RedisServer
from tests.support.service import serving, serving_process
from tests.support.versions import publish_copy

pytestmark = needs("nginx")


@contextmanager
def replicas(index: Path, folder: Path, **settings: Any) -> Iterator[tuple[list[FastAPI], str]]:
    """Two services behind nginx, and its URL."""
    with ExitStack() as stack:
        services = [stack.enter_context(serving(index, **settings)) for _ in range(2)]
        url = stack.enter_context(behind_nginx(folder, *(port for _, port in services)))
        yield [app for app, _ in services], url


def test_a_publish_under_load_fails_no_request(index: Path, tmp_path: Path) -> None:
    publish_copy(index)
    with replicas(index, tmp_path, poll_s=0.05) as (apps, url), searching(url) as statuses:
        for version in (1, 2, 1):
            rollback(index, version)
            end, seen = time.monotonic() + 20, len(statuses)
            while {app.state.collections[None].live.version for app in apps} != {version} or len(statuses) < seen + 20:
                assert time.monotonic() < end
                time.sleep(0.01)
    assert Counter(statuses) == {200: len(statuses)}


@pytest.mark.redis
def test_replicas_share_limits_and_nginx_has_its_own(
    built_index: Path, tmp_path: Path, redis_server: RedisServer
) -> None:
    with replicas(built_index, tmp_path, redis_url=redis_server.url, rate_limit="20/minute") as (_, url):
        spoofed = ({"X-Forwarded-For": f"192.0.2.{number}"} for number in range(30))
        found = Counter(httpx.get(f"{url}/items?k=1", headers=headers).status_code for headers in spoofed)
        assert found == {200: 20, 429: 10}, "both count together, whatever address a caller names"
        assert [httpx.get(url + path).status_code for path in ("/metrics", "/admin/reload")] == [403, 403]
        assert httpx.get(url, headers={"X-Long": "x" * 20_000}).status_code == 400
        assert httpx.post(f"{url}/search/image", content=bytes(31 * 2**20)).status_code == 413
        assert httpx.get(f"{url}/readyz").json()["status"] == "ready"


@pytest.mark.slow
def test_a_killed_replica_fails_no_search(built_index: Path, tmp_path: Path) -> None:
    with (
        serving_process(built_index, DCAR_LOG_LEVEL="warning") as (victim, client, _),
        serving(built_index) as (_, port),
        behind_nginx(tmp_path, client.base_url.port or 0, port) as url,
    ):
        with searching(url) as statuses:
            while len(statuses) < 50:
                time.sleep(0.01)
            victim.send_signal(signal.SIGKILL)
            victim.wait(10)
            seen = len(statuses)
            while len(statuses) < seen + 50:
                time.sleep(0.01)
        assert Counter(statuses) == {200: len(statuses)}


def test_the_profile_has_what_the_configuration_names() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert {name for name, each in services.items() if each.get("profiles") == ["replicas"]} == {"replica", "nginx"}
    own = ("networks", "ports", "profiles")
    same = {name: value for name, value in services["api"].items() if name not in own}
    assert {name: value for name, value in services["replica"].items() if name not in own} == same
    addresses = {services[name]["networks"]["web"]["ipv4_address"] for name in ("api", "replica")}
    assert len(addresses) == 2, "which nginx looks up once"
    assert services["replica"]["ports"] == []
    assert services["nginx"]["volumes"] == ["./nginx.conf:/etc/nginx/nginx.conf:ro"]
    assert services["nginx"]["ports"][0].endswith(":8080")
