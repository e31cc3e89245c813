"""Each kind of Redis URL against a real server: TLS, a password, a socket."""

import asyncio
import subprocess
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr

from app.core.metrics import Metrics
from app.core.redis import connect
from app.core.settings import Settings
from app.service.embedding_cache import EmbeddingCache, rounded
from tests.support.parts import needs
from tests.support.redis_server import RedisServer
from tests.support.service import until

VECTOR = np.linspace(-1, 1, 32, dtype=np.float32)
pytestmark = pytest.mark.redis


async def assert_cached(url: str, seconds: float = 10) -> None:
    """Assert that embeddings written through this URL are read back, and then many at once."""
    settings = Settings.model_construct(cache_size=0, redis_url=SecretStr(url), redis_timeout_ms=2000)
    cache = EmbeddingCache(settings, Metrics())

    async def are_cached(keys: Iterable[str]) -> bool:
        found = await asyncio.gather(*(cache.get(key, 32) for key in keys))
        return all(vector is not None and np.array_equal(vector, rounded(VECTOR)) for vector in found)

    try:
        for count in (1, 100):
            keys = [f"{key} of {count}" for key in range(count)]
            for key in keys:
                cache.put(key, VECTOR)
            await until(partial(are_cached, keys), seconds)
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
        with pytest.raises(AssertionError, match="it did not happen in time"):  # an unknown certificate authority
            await assert_cached(f"rediss://127.0.0.1:{server.port}/0", seconds=0)


async def test_a_password_a_database_and_a_socket_are_used(tmp_path: Path) -> None:
    with RedisServer("--requirepass", "pass/word", "--unixsocket", str(tmp_path / "redis.sock")) as server:
        await assert_cached(f"redis://:pass%2Fword@127.0.0.1:{server.port}/3")
        await assert_cached(f"unix://:pass%2Fword@{tmp_path}/redis.sock")


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("http://:secretword@localhost", "must be redis://"),
        ("redis+cluster://:secretword@localhost", "must be redis://"),
        ("redis://:secretword@localhost:many", "must be redis://"),
        ("redis://:half/secretword@localhost", "%2F"),
        ("redis://:secretword@localhost?socket_timeout=soon", "must be redis://"),
        ("redis://:secretword@localhost?colour=red", "an option that redis-py does not know"),
        ("rediss://:secretword@localhost?ssl_ca_certs=/nowhere.pem", r"/nowhere\.pem as ssl_ca_certs"),
        ("rediss://:secretword@localhost?ssl_cert_reqs=maybe", "invalid option: Invalid SSL .* maybe"),
    ],
)
def test_an_invalid_url_is_refused_without_showing_its_password(url: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint) as caught:
        connect(url)
    assert "half" not in str(caught.value)
    assert "secretword" not in str(caught.value)
