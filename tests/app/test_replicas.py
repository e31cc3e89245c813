"""Services on one index: behind a real nginx with the configuration of the compose
file, or on an object store.
"""

import logging
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml  # type: ignore[import-untyped]

from app.core.settings import Settings
from app.service.write_worker import require_writable
from dcar_core.util.errors import DcarError
from index_jobs.index.stores import index_path, store_of
from index_jobs.index.versions import rollback
from tests.support.object_store import ACCESS, Machines, ObjectStore
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.servers import behind_nginx, searching
from tests.support.service import (
    ADMIN,
    ADMIN_ONLY,
    WORDS,
    opened,
    serving,
    serving_process,
    until,
    until_ready,
)
from tests.support.versions import publish_copy
from tests.support.writes import ADMINS

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HIDDEN = b"GET /collections HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = (
    b"POST /search/text HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
    b" application/json\r\nContent-Length: %d\r\n"
)
OFFER = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"


@contextmanager
def replicas(index: Path, folder: Path, count: int) -> Iterator[str]:
    """The URL of an nginx before services."""
    with ExitStack() as stack:
        services = [stack.enter_context(serving(index)) for _ in range(count)]
        port = stack.enter_context(
            behind_nginx(folder, *(port for _, port in services))
        )
        yield f"http://127.0.0.1:{port}"


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=20)


@needs("nginx")
@pytest.mark.parametrize("count", [1, 2])
def test_strangers_reach_no_metrics_admin_or_hidden_request(
    built_index: Path,
    tmp_path: Path,
    count: int,
) -> None:
    with replicas(built_index, tmp_path, count) as url:
        for path in (
            "/metrics",
            "//metrics",
            "/%6detrics",
            "/admin/reload",
            "/ui/../admin/reload",
        ):
            with connect(url) as connection:
                connection.sendall(HEALTH.replace(b"/healthz", path.encode()))
                assert connection.recv(12) == b"HTTP/1.1 403", path
        for pieces in (
            [POST % len(HIDDEN), OFFER + b"\r\n", HIDDEN],
            [HEALTH + POST % len(HIDDEN) + OFFER + b"\r\n", HIDDEN],
        ):
            with connect(url) as connection:
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(0.1)
                connection.shutdown(socket.SHUT_WR)
                response = b"".join(iter(lambda: connection.recv(65536), b""))
            assert b"HTTP/1.1 400" in response
            assert b'"collections"' not in response
        assert httpx.get(url, headers={"X-Long": "x" * 20_000}).status_code == 400
        assert (
            httpx.post(f"{url}/search/image", content=bytes(31 * 2**20)).status_code
            == 413
        )
        assert httpx.get(f"{url}/readyz").json()["status"] == "ready"


@needs("nginx")
@pytest.mark.slow
def test_half_heads_delay_nobody_and_end(built_index: Path, tmp_path: Path) -> None:
    with replicas(built_index, tmp_path, 1) as url, ExitStack() as stack:
        began = time.monotonic()
        half = [stack.enter_context(connect(url)) for _ in range(600)]
        for connection in half:
            connection.sendall(HEALTH[:-2])
        assert (
            httpx.post(
                f"{url}/search/text",
                json={"query": "red"},
                timeout=2,
            ).status_code
            == 200
        )
        assert all(connection.recv(1) == b"" for connection in half)
        assert time.monotonic() - began < 20


@needs("nginx")
@pytest.mark.slow
def test_a_killed_replica_fails_no_search(built_index: Path, tmp_path: Path) -> None:
    with (
        serving_process(built_index, DCAR_LOG_LEVEL="warning") as (victim, client, _),
        serving(built_index) as (_, port),
        behind_nginx(tmp_path, client.base_url.port or 0, port) as proxy,
    ):
        with searching(f"http://127.0.0.1:{proxy}") as statuses:
            while len(statuses) < 50:
                time.sleep(0.01)
            victim.send_signal(signal.SIGKILL)
            victim.wait(10)
            seen = len(statuses)
            while len(statuses) < seen + 50:
                time.sleep(0.01)
        assert Counter(statuses) == {200: len(statuses)}


def test_strangers_come_through_nginx_and_the_profile_adds_a_like_service() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert services["replica"].pop("profiles") == ["replicas"]
    webs = [services[name].pop("networks")["web"] for name in ("api", "replica")]
    assert services["replica"] == services["api"]
    assert len({web["ipv4_address"] for web in webs}) == 2, "which nginx looks up once"
    assert "profiles" not in services["nginx"]
    assert {name for name, each in services.items() if "ports" in each} == {
        "nginx",
        "grafana",
    }
    assert services["nginx"]["ports"] == ["127.0.0.1:${DCAR_PORT_PUBLISHED:-8000}:8080"]
    assert services["nginx"]["volumes"] == ["./nginx.conf:/etc/nginx/nginx.conf:ro"]
    ((name,),) = {tuple(web["aliases"]) for web in webs}
    assert f"server {name}:8000 " in (ROOT / "nginx.conf").read_text()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ObjectStore]:
    (tmp_path / "store").mkdir()
    with ObjectStore(tmp_path / "store") as server:
        yield server


@pytest.fixture
def machines(
    server: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Machines:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("app.service.collections.RETRY_S", 0.2)
    return Machines(tmp_path, "s3://bucket/shop/index")


@needs("seaweedfs")
@pytest.mark.slow
async def test_replica_follows_the_store_and_serves_on_without_it(
    built_index: Path,
    machines: Machines,
    server: ObjectStore,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = machines["empty"]
    failures = list[DcarError]()
    async with opened(
        empty,
        ready=False,
        on_start_failure=failures.append,
        poll_s=0.05,
    ) as starting:
        await until(lambda: bool(failures))
        publish_copy(machines["builder"], source=built_index)
        await until_ready(starting, status="ready", index_version=1)
    assert "s3://bucket/shop/index holds no published index; make one with" in str(
        failures[0]
    )
    # of replicas alone
    monkeypatch.setattr(
        "index_jobs.index.stores.CLIENT", {"timeout": "2s", "allow_http": True}
    )
    monkeypatch.setattr("index_jobs.index.stores.RETRIES", {"max_retries": 0})
    replica = machines["replica"]
    async with opened(replica, poll_s=0.05, **ADMIN_ONLY) as client:
        response = await client.post("/search/text", json=WORDS)
        found = response.json()
        publish_copy(machines["builder"])
        await until_ready(client, status="ready", index_version=2)
        rollback(machines["builder"])
        await until_ready(client, status="ready", index_version=1)
        with caplog.at_level(logging.ERROR, "app.service.collections"):
            server.send_signal(signal.SIGSTOP)
            body = await until_ready(client, status="degraded", index_version=1)
            again = await client.post("/admin/reload", headers=ADMINS)
            assert again.status_code == 503
        assert body["reason"].startswith("s3://bucket/shop/index is not available")
        (logged,) = caplog.messages  # once for the same reason
        assert (
            "is served, and its object store is not followed: s3://bucket/shop/index is"
            " not available" in logged
        )
        response = await client.get("/metrics", headers=ADMINS)
        assert 'dcar_index_degraded{collection="index"} 1.0' in response.text
        response = await client.post("/search/text", json=WORDS)
        assert response.json()["results"] == found["results"]
        server.send_signal(signal.SIGCONT)
        await until_ready(client, status="ready")
        publish_copy(machines["builder"])
        await until_ready(client, status="ready", index_version=3)
    server.stop()
    async with opened(replica, poll_s=0.05) as restarted:
        await until_ready(restarted, status="degraded", index_version=3)
        response = await restarted.post("/search/text", json=WORDS)
        assert response.json()["results"] == found["results"]


@needs("object-store")
def test_changes_over_http_of_an_index_in_a_store_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ACCESS, "DCAR_RUNTIME_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DCAR_COLLECTIONS", '{"more": "gs://bucket/more/"}')
    settings = Settings(index="s3://bucket/index", writes=True, admin_key=ADMIN)
    assert settings.indexes == {
        "index": index_path("s3://bucket/index"),
        "more": index_path("gs://bucket/more"),
    }
    assert settings.index == tmp_path / "indexes/s3/bucket/index"
    assert settings.default_collection == "index"
    with pytest.raises(
        DcarError,
        match="s3://bucket/index is in an object store, to which only jobs publish",
    ):
        require_writable(settings)
    with pytest.raises(DcarError, match="DCAR_FEEDBACK must name a directory"):
        require_writable(
            settings.model_copy(update={"writes": False, "feedback": True})
        )
    assert store_of(tmp_path) is None
