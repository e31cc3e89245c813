"""One service or two on an index, behind a real nginx with the configuration of the compose file."""

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

from tests.support.load import searching
from tests.support.nginx import behind_nginx
from tests.support.parts import needs
from tests.support.paths import ROOT
from tests.support.service import serving, serving_process

pytestmark = needs("nginx")
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HIDDEN = b"GET /collections HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /search/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
OFFER = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"


@contextmanager
def replicas(index: Path, folder: Path, count: int) -> Iterator[str]:
    """The URL of an nginx before services."""
    with ExitStack() as stack:
        services = [stack.enter_context(serving(index)) for _ in range(count)]
        port = stack.enter_context(behind_nginx(folder, *(port for _, port in services)))
        yield f"http://127.0.0.1:{port}"


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=20)


@pytest.mark.parametrize("count", [1, 2])
def test_strangers_reach_neither_metrics_nor_admin_nor_a_hidden_request(
    built_index: Path, tmp_path: Path, count: int
) -> None:
    with replicas(built_index, tmp_path, count) as url:
        for path in ("/metrics", "//metrics", "/%6detrics", "/admin/reload", "/ui/../admin/reload"):
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
        assert httpx.post(f"{url}/search/image", content=bytes(31 * 2**20)).status_code == 413
        assert httpx.get(f"{url}/readyz").json()["status"] == "ready"


@pytest.mark.slow
def test_half_heads_delay_nobody_and_end(built_index: Path, tmp_path: Path) -> None:
    with replicas(built_index, tmp_path, 1) as url, ExitStack() as stack:
        began = time.monotonic()
        half = [stack.enter_context(connect(url)) for _ in range(600)]
        for connection in half:
            connection.sendall(HEALTH[:-2])
        assert httpx.post(f"{url}/search/text", json={"query": "red"}, timeout=2).status_code == 200
        assert all(connection.recv(1) == b"" for connection in half)
        assert time.monotonic() - began < 20


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


def test_strangers_come_through_nginx_and_the_profile_adds_a_service_like_the_first() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert services["replica"].pop("profiles") == ["replicas"]
    webs = [services[name].pop("networks")["web"] for name in ("api", "replica")]
    assert services["replica"] == services["api"]
    assert len({web["ipv4_address"] for web in webs}) == 2, "which nginx looks up once"
    assert "profiles" not in services["nginx"]
    assert {name for name, each in services.items() if "ports" in each} == {"nginx", "grafana"}
    assert services["nginx"]["ports"] == ["127.0.0.1:${DCAR_PORT_PUBLISHED:-8000}:8080"]
    assert services["nginx"]["volumes"] == ["./nginx.conf:/etc/nginx/nginx.conf:ro"]
    ((name,),) = {tuple(web["aliases"]) for web in webs}
    assert f"server {name}:8000 " in (ROOT / "nginx.conf").read_text()
