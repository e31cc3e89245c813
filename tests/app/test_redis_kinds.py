"""Each kind of Redis URL against a real server: TLS, sentinel, cluster, socket."""

import asyncio
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr

from app.core.metrics import Metrics
from app.core.redis import connect
from app.core.settings import Settings
from app.service.embedding_cache import EmbeddingCache, rounded
from tests.support.parts import needs
from tests.support.processes import free_port
from tests.support.redis_server import RedisServer

VECTOR = np.linspace(-1, 1, 32, dtype=np.float32)
pytestmark = pytest.mark.redis


async def assert_cached(url: str, seconds: float = 10) -> None:
    """Assert that an embedding written through this URL is read back once the servers are up, and then many at once."""
    settings = Settings.model_construct(cache_size=0, redis_url=SecretStr(url), redis_timeout_ms=2000)
    cache = EmbeddingCache(settings, Metrics())
    end = time.monotonic() + seconds
    try:
        while True:
            cache.put("key", VECTOR)
            await asyncio.gather(*cache._writes)
            found = await cache.get("key", 32)
            if found is not None:
                np.testing.assert_array_equal(found, rounded(VECTOR))
                break
            assert time.monotonic() < end, "nothing is cached"
            cache.read_breaker._pause = cache.write_breaker._pause = 0.05
            await asyncio.sleep(0.1)
        for key in range(100):
            cache.put(str(key), VECTOR)
        await asyncio.gather(*cache._writes)
        found_by = await asyncio.gather(*(cache.get(str(key), 32) for key in range(100)))
        assert all(each is not None for each in found_by)
        assert not cache.read_breaker.is_open
        assert not cache.write_breaker.is_open
    finally:
        await cache.close()


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
        await assert_cached(f"rediss://127.0.0.1:{server.port}/0?ssl_ca_certs={certificate}")
        with pytest.raises(AssertionError, match="nothing is cached"):  # an unknown certificate authority
            await assert_cached(f"rediss://127.0.0.1:{server.port}/0", seconds=0)


async def test_a_password_and_a_database_are_used() -> None:
    with RedisServer("--requirepass", "pass/word") as server:
        await assert_cached(f"redis://:pass%2Fword@127.0.0.1:{server.port}/3")


@pytest.mark.slow
async def test_a_cluster_is_used() -> None:
    bus = free_port()
    with RedisServer(
        "--cluster-enabled",
        "yes",
        "--cluster-port",
        str(bus),
        "--dir",
        "/tmp",
        "--cluster-config-file",
        f"nodes-{bus}.conf",
    ) as server:
        try:
            ask = ["redis-cli", "-p", str(server.port), "cluster", "addslotsrange", "0", "16383"]
            subprocess.run(ask, check=True, capture_output=True)
            await assert_cached(f"redis+cluster://127.0.0.1:1,127.0.0.1:{server.port}")
        finally:
            Path(f"/tmp/nodes-{bus}.conf").unlink(missing_ok=True)


async def test_the_master_of_a_sentinel_is_used(tmp_path: Path) -> None:
    with RedisServer("--requirepass", "word") as master:
        configuration = tmp_path / "sentinel.conf"
        configuration.write_text(
            f"sentinel monitor pictures 127.0.0.1 {master.port} 1\nsentinel auth-pass pictures word\n"
        )
        with RedisServer(str(configuration), "--sentinel") as sentinel:
            await assert_cached(f"redis+sentinel://:word@127.0.0.1:1,127.0.0.1:{sentinel.port}/pictures/1")


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("http://:secretword@localhost", "must be redis://"),
        ("redis+sentinel://:secretword@localhost:26379", "must be .* redis.sentinel://host.*/service"),
        ("redis+cluster://", "must be redis://"),
        ("redis://:secretword@localhost:many", "must be redis://"),
        ("redis://:half/secretword@localhost", "%2F"),
        ("redis://:secretword@localhost?socket_timeout=soon", "must be redis://"),
        ("redis://:secretword@localhost?colour=red", "an option that redis-py does not know"),
        ("redis+cluster://:secretword@localhost?db=3", "invalid option: Argument 'db'"),
        ("rediss://:secretword@localhost?ssl_ca_certs=/nowhere.pem", r"/nowhere\.pem as ssl_ca_certs"),
        ("rediss+sentinel://:secretword@localhost/pictures?ssl_keyfile=/nowhere.pem", "ssl_keyfile"),
        ("rediss://:secretword@localhost?ssl_cert_reqs=maybe", "invalid option: Invalid SSL .* maybe"),
    ],
)
def test_an_invalid_url_is_refused_without_showing_its_password(url: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint) as caught:
        connect(url, timeout_s=1)
    assert "half" not in str(caught.value)
    assert "secretword" not in str(caught.value)
