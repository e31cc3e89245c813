"""Redis, in which processes count together: each kind of URL, a server that fails, and nonsense."""

import asyncio
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from app.core.callers import RateLimiter, connect
from tests.support.parts import needs
from tests.support.redis_server import RedisServer
from tests.support.service import opened

pytestmark = pytest.mark.redis


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.core.callers.TIMEOUT_S", 2)


async def assert_shared(url: str) -> None:
    """Assert that two processes count together through this URL."""
    limiters = [RateLimiter("2/minute", redis_url=url) for _ in range(2)]
    try:
        waits = [await limiter.charge("alice") for limiter in (*limiters, *limiters)]
        assert [wait > 0 for wait in waits] == [False, False, True, True]
    finally:
        for limiter in limiters:
            await limiter.close()


@pytest.mark.parametrize("fault", ["missing", "hanging"])
async def test_a_faulty_redis_fails_no_search_and_costs_little(
    built_index: Path, fault: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("redis_server") if fault == "hanging" else None
    url = server.url if server else "redis://127.0.0.1:1/0"
    async with opened(built_index, redis_url=url, rate_limit="1000/minute") as client:
        if server is not None:
            server.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(5):
                for _ in range(6):
                    assert (await client.post("/search/text", json={"query": "red"})).status_code == 200
        finally:
            if server is not None:
                server.send_signal(signal.SIGCONT)


NONSENSE = [b"*1\r\n" * 20_000, b"%1\r\n*1\r\n+a\r\n+b\r\n", b"$x\r\n", b":1\r\n", b"html\r\n", b""]


@pytest.mark.parametrize("reply", NONSENSE)
async def test_an_invalid_or_no_redis_reply_fails_no_count(reply: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while await reader.readline():
                writer.write(reply)
                await writer.drain()
                await reader.read(4096)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for options in ("", "?protocol=2", "?socket_timeout=60&socket_connect_timeout=60"):  # the service has its own
        rates = RateLimiter("2/minute", redis_url=f"redis://127.0.0.1:{port}/0{options}")
        async with asyncio.timeout(20):
            assert min([await rates.charge("alice") for _ in range(3)]) >= 0
            await rates.close()
    server.close()


def certificates(folder: Path) -> tuple[Path, Path]:
    """Make a key and a self-signed certificate for 127.0.0.1."""
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return key, certificate


@needs("openssl")
async def test_a_tls_server_is_used_and_its_certificate_checked(tmp_path: Path) -> None:
    key, certificate = certificates(tmp_path)
    options = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no")
    with RedisServer(*options) as server:
        await assert_shared(f"rediss://127.0.0.1:{server.port}/0?ssl_ca_certs={certificate}")
        with pytest.raises(AssertionError):  # an unknown certificate authority
            await assert_shared(f"rediss://127.0.0.1:{server.port}/0")


async def test_a_password_a_database_and_a_socket_are_used(tmp_path: Path) -> None:
    with RedisServer("--requirepass", "pass/word", "--unixsocket", str(tmp_path / "redis.sock")) as server:
        await assert_shared(f"redis://:pass%2Fword@127.0.0.1:{server.port}/3")
        await assert_shared(f"unix://:pass%2Fword@{tmp_path}/redis.sock")


@pytest.mark.parametrize(
    "url",
    [
        "http://:secretword@localhost",
        "redis://:secretword@localhost:many",
        "redis://:half/secretword@localhost",
        "redis://:secretword@localhost?socket_timeout=soon",
        "redis://:secretword@localhost?colour=red",
        "rediss://:secretword@localhost?ssl_cert_reqs=maybe",
    ],
)
def test_an_invalid_url_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"must be redis://.* %2F") as caught:
        connect(url)
    assert "half" not in str(caught.value)
    assert "secretword" not in str(caught.value)
