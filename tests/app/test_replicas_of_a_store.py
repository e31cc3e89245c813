"""Services on an index in object storage: they follow it, and survive its loss. The store is SeaweedFS."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.settings import Settings
from app.service.write_worker import require_writable
from dcar_core.util.errors import DcarError
from index_jobs.index.storage import index_path, store_of
from index_jobs.index.versions import rollback
from tests.support.object_store import ACCESS, Machines, ObjectStore
from tests.support.parts import needs
from tests.support.service import ADMIN, ADMIN_ONLY, WORDS, opened, until, until_ready
from tests.support.versions import publish_copy
from tests.support.writes import ADMINS


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ObjectStore]:
    (tmp_path / "store").mkdir()
    with ObjectStore(tmp_path / "store") as server:
        yield server


@pytest.fixture
def machines(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
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
    empty, failures = machines["empty"], list[DcarError]()
    async with opened(empty, ready=False, on_start_failure=failures.append, poll_s=0.05) as starting:
        await until(lambda: bool(failures))
        publish_copy(machines["builder"], source=built_index)
        await until_ready(starting, status="ready", index_version=1)
    assert "s3://bucket/shop/index holds no published index; make one with" in str(failures[0])
    monkeypatch.setattr("index_jobs.index.storage.CLIENT", {"timeout": "2s", "allow_http": True})  # of replicas alone
    monkeypatch.setattr("index_jobs.index.storage.RETRIES", {"max_retries": 0})
    replica = machines["replica"]
    async with opened(replica, poll_s=0.05, **ADMIN_ONLY) as client:
        found = (await client.post("/search/text", json=WORDS)).json()
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
        assert "is served, and its object store is not followed: s3://bucket/shop/index is not available" in logged
        assert 'dcar_index_degraded{collection="index"} 1.0' in (await client.get("/metrics", headers=ADMINS)).text
        assert (await client.post("/search/text", json=WORDS)).json()["results"] == found["results"]
        server.send_signal(signal.SIGCONT)
        await until_ready(client, status="ready")
        publish_copy(machines["builder"])
        await until_ready(client, status="ready", index_version=3)
    server.stop()
    async with opened(replica, poll_s=0.05) as restarted:
        await until_ready(restarted, status="degraded", index_version=3)
        assert (await restarted.post("/search/text", json=WORDS)).json()["results"] == found["results"]


@needs("object-store")
def test_changes_over_http_of_an_index_in_a_store_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**ACCESS, "DCAR_RUNTIME_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DCAR_COLLECTIONS", '{"more": "gs://bucket/more/"}')
    settings = Settings(index="s3://bucket/index", writes=True, admin_key=ADMIN)
    assert settings.indexes == {"index": index_path("s3://bucket/index"), "more": index_path("gs://bucket/more")}
    assert settings.index == tmp_path / "indexes/s3/bucket/index"
    assert settings.default_collection == "index"
    with pytest.raises(DcarError, match="s3://bucket/index is in an object store, to which only jobs publish"):
        require_writable(settings)
    with pytest.raises(DcarError, match="DCAR_FEEDBACK must name a directory"):
        require_writable(settings.model_copy(update={"writes": False, "feedback": True}))
    assert store_of(tmp_path) is None
