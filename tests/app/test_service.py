"""The service around the search: starts, swaps of versions, admin, pages, unexpected
errors and failing tasks.
"""

import asyncio
import gc
import itertools
import re
import shutil
import socket
import time
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from dcar_client.models import ReloadResponse

from app.core.metrics import Metrics
from app.core.settings import Settings
from app.core.turns import supervise
from app.server import serve
from dcar_core.util.errors import DcarError
from index_jobs.index.manifest import WAITING, Current
from index_jobs.index.versions import current_version, rollback
from index_jobs.rebuild import rebuild
from tests.support.commands import Command
from tests.support.images import png
from tests.support.parts import needs
from tests.support.processes import free_port
from tests.support.responses import assert_problem, scrape
from tests.support.service import (
    ADMIN_ONLY,
    SERVE,
    ServiceClient,
    before_encoding,
    opened,
    restore,
    until_ready,
)
from tests.support.versions import file_of, point, publish_copy
from tests.support.writes import ADMINS


async def test_broken_version_keeps_the_old_one_served_until_it_is_repaired(
    index: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish_copy(index)
    rollback(index, 1)
    newer_weights = file_of(index, "checkpoint/trainables.safetensors", 2)
    whole = newer_weights.read_bytes()
    monkeypatch.setattr("app.service.collections.RETRY_S", 0.1)
    async with opened(index, poll_s=0.02, **ADMIN_ONLY) as client:
        newer_weights.write_bytes(whole[:100])
        point(index, 2)
        ready = await until_ready(client, status="degraded")
        assert ready["index_version"] == 1
        assert "trainables.safetensors" in ready["reason"]
        refused = await client.post("/admin/reload", headers=ADMINS)
        assert refused.status_code == 503
        assert "trainables.safetensors" in refused.json()["detail"]
        assert int(refused.headers["retry-after"]) > 0
        response = await client.post("/search/text", json={"query": "x"})
        assert response.json()["index_version"] == 1
        newer_weights.write_bytes(whole)
        await until_ready(client, status="ready", index_version=2)
        for version in (
            b"junk\n",
            b"7" * 5000,
            Current(7, "0" * 64).to_bytes(),
        ):
            (index / "CURRENT").write_bytes(version)
            ready = await until_ready(client, status="degraded")
            assert str(index.parent) not in str(ready)
            point(index, 2)
            await until_ready(client, status="ready")
        assert ready["reason"].startswith("index has no version 7")
        (index / WAITING).write_text(
            reason := "21 of the 24 images are gone; mount what is missing"
        )
        assert (await until_ready(client, status="degraded"))["reason"] == reason
        response = await client.get("/ui/catalogue")
        assert response.json()["model_note"].endswith(reason)
        (index / WAITING).unlink()
        await until_ready(client, status="ready")
    assert not [record for record in caplog.records if record.exc_info]


async def test_rebuilt_index_with_the_same_number_is_served(
    index: Path,
    gallery: Path,
    other_checkpoint: Path,
) -> None:
    async with opened(index, poll_s=0, **ADMIN_ONLY) as client:
        response = await client.post("/search/text", json={"query": "red"})
        before = response.json()
        response = await client.post("/admin/reload", headers=ADMINS)
        assert not response.json()["changed"]
        manifest = index / "versions/1.json"
        manifest.rename(index / "aside")
        response = await client.post("/admin/reload", headers=ADMINS)
        assert not response.json()["changed"]
        response = await client.get("/readyz")
        assert response.json()["status"] == "ready", "the served version is intact"
        shutil.rmtree(index)
        await asyncio.to_thread(
            rebuild,
            gallery,
            other_checkpoint,
            index,
            workers=0,
            progress=False,
        )
        response = await client.post("/admin/reload", headers=ADMINS)
        reloaded = response.json()
        ReloadResponse.model_validate(reloaded, strict=True)
        assert reloaded == {
            "index_version": 1,
            "versions": {index.name: 1},
            "changed": True,
        }
        response = await client.post("/search/text", json={"query": "red"})
        after = response.json()
        assert after["index_version"] == before["index_version"] == 1
        assert [r["score"] for r in after["results"]] != [
            r["score"] for r in before["results"]
        ]
        response = await client.post("/admin/reload", headers=ADMINS)
        assert not response.json()["changed"]


async def test_missing_broken_and_outside_images_are_404(
    tmp_path: Path,
    gallery: Path,
    tiny_checkpoint: Path,
) -> None:
    changing = Path(shutil.copytree(gallery, tmp_path / "gallery"))
    rebuild(changing, tiny_checkpoint, tmp_path / "other", workers=0, progress=False)
    (changing / "circle/red.png").unlink()
    (changing / "circle/blue.png").write_text("<script>alert(1)</script>")
    (changing / "circle/black.png").write_bytes(png()[:60])
    (tmp_path / "secret.png").write_bytes(png())
    (changing / "circle/green.png").unlink()
    (changing / "circle/green.png").symlink_to(tmp_path / "secret.png")

    async with opened(tmp_path / "other") as client:
        paths = [
            f"{color}.png/image{size}"
            for color, size in product(("red", "blue", "green"), ("", "?size=192"))
        ]
        for path in (*paths, "black.png/image?size=192"):
            response = await client.get(f"/items/circle%2F{path}")
            assert response.status_code == 404, path
            assert str(changing) not in response.text
    async with opened(tmp_path / "other", image_roots=(tmp_path,)) as client:
        assert (await client.get("/items/circle%2Fgreen.png/image")).content == png(), (
            "unless that folder is allowed"
        )


async def test_unexpected_errors_reveal_no_internals(
    built_index: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret detail")

    async with opened(built_index) as client:
        encoder = client.app.state.collections[None].current.encoder
        before_encoding(encoder, fail)
        failed = await client.post("/search/text", json={"query": "x"})
        restore(encoder)
        monkeypatch.setattr("app.search.query.filter_rows", fail)
        filtered = {"query": "x", "filter": {"color": "red"}}
        failed_later = await client.post(
            "/search/text",
            json=filtered,
            headers={"x-request-id": "failing"},
        )
        for response in (failed, failed_later):
            assert "secret" not in assert_problem(response, 500)["detail"]
        assert failed_later.headers["x-request-id"] == "failing"
        assert "unexpected error in POST /search/text" in caplog.text
        assert (
            await client.post("/search/text", json={"query": "x"})
        ).status_code == 200


async def test_pages_load_nothing_from_other_sites_and_admin_routes_need_a_key(
    started: ServiceClient,
) -> None:
    for path in ("/", "/docs"):
        page = await started.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert not re.search("https?:", page.text)
        assert "script-src 'self';" in page.headers["content-security-policy"]
        response = await started.get(
            path, headers={"If-None-Match": page.headers["etag"]}
        )
        assert response.status_code == 304
        for name in [part.split('"')[0] for part in page.text.split('"ui/')[1:]]:
            response = await started.get(f"/ui/{name}")
            assert response.status_code == 200, name
    assert (
        "DCAR_ADMIN_KEY"
        in assert_problem(await started.post("/admin/reload"), 403)["detail"]
    )


async def test_a_failing_task_is_counted_and_restarted_until_it_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.core.turns.RESTART_S", 0.01)
    metrics = Metrics()
    errors = list[BaseException]()
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            # a panic in Rust is no Exception
            raise (ValueError if runs == 1 else BaseException)(runs)

    await supervise("test task", run, metrics, on_failure=errors.append)
    assert [str(error) for error in errors] == ["1", "2"]
    assert (
        metrics.registry.get_sample_value(
            "dcar_task_failures_total", {"task": "test task"}
        )
        == 2
    )


async def test_a_failure_of_the_poller_degrades_readiness_until_it_works_again(
    built_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.core.turns.RESTART_S", 0.01)
    async with opened(built_index, poll_s=0.02) as client:

        def fail(_: Path) -> int:
            raise RecursionError("from /a/place/in/the/file/system")

        monkeypatch.setattr("app.service.collections.current_version", fail)
        reason = (await until_ready(client, status="degraded"))["reason"]
        assert "check for new versions failed: RecursionError" in reason
        assert "/a/place" not in reason
        metrics = await scrape(client)
        assert metrics["dcar_task_failures_total", (("task", "version poller"),)] >= 1
        assert metrics["dcar_index_degraded", (("collection", "index"),)] == 1
        monkeypatch.setattr("app.service.collections.current_version", current_version)
        await until_ready(client, status="ready")


async def test_served_file_that_is_cut_off_is_reported_once_until_it_is_whole(
    index: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("app.service.collections.CHECK_S", 0.1)
    items = file_of(index, "items.arrow")
    started = time.time()
    async with opened(index, poll_s=0.02) as client:
        aside = items.rename(index / "aside")  # still mapped
        items.write_bytes(aside.read_bytes()[:-1])
        reason = (await until_ready(client, status="degraded"))["reason"]
        assert reason.endswith(
            ": items.arrow of version 1; roll back, or rebuild the index"
        )
        assert str(index.parent) not in reason
        response = await client.get("/collections")
        assert response.json()["collections"][0]["reason"] == reason
        response = await client.post("/search/text", json={"query": "red"})
        assert response.json()["results"]
        aside.replace(items)
        await until_ready(client, status="ready", reason=None)
        metrics = await scrape(client)
    assert (
        metrics["dcar_file_check_interval_seconds", (("collection", "index"),)] == 0.1
    )
    assert (
        started
        < metrics["dcar_file_check_timestamp_seconds", (("collection", "index"),)]
        < time.time()
    )
    assert caplog.text.count("is damaged") == 1


@pytest.mark.slow
async def test_swaps_under_load_drop_no_request_and_free_what_they_replace(
    index: Path,
    gallery: Path,
    tiny_checkpoint: Path,
    other_checkpoint: Path,
) -> None:
    checkpoints = {1: tiny_checkpoint, 2: other_checkpoint, 3: tiny_checkpoint}
    for version in (2, 3):
        rebuild(
            gallery,
            checkpoints[version],
            index,
            workers=0,
            progress=False,
            force=True,
            keep=3,
        )
    rollback(index, 1)
    sizes = itertools.cycle(range(40, 90))
    words = (f"a red square {number}" for number in itertools.count())  # never cached
    seen = list[tuple[int, weakref.ref[Any]]]()
    expected = dict[Path, Any]()
    asked = 0
    done = False

    async with opened(index, poll_s=0, deadline_ms=60_000, **ADMIN_ONLY) as client:

        async def ask(number: int) -> None:
            nonlocal asked
            search = "/search/text"
            while not done:
                sent = [
                    lambda: client.post(
                        search, json={"query": "a red square", "k": 24}
                    ),
                    lambda: client.post(search, json={"query": next(words)}),
                    lambda: client.post(
                        search, json={"query": next(words), "explain": True, "k": 2}
                    ),
                    lambda: client.post(
                        "/search/image", files={"file": png(size=(next(sizes), 40))}
                    ),
                    lambda: client.get("/items/circle%2Fred.png/similar"),
                ]
                response = await sent[number]()
                assert response.status_code == 200, response.text
                checkpoint = checkpoints[response.json()["index_version"]]
                results = response.json()["results"]
                assert number or results == expected.setdefault(checkpoint, results), (
                    "results of one version"
                )
                asked += 1
                await asyncio.sleep(0.01)  # leave the interpreter to the loading thread

        async def swap(version: int) -> None:
            await asyncio.to_thread(rollback, index, version)
            response = await client.post("/admin/reload", headers=ADMINS)
            reloaded = response.json()
            assert reloaded["index_version"] == version
            assert reloaded["changed"] is True
            live = client.app.state.collections[None].current
            seen.extend(
                (version, weakref.ref(part))
                for part in (live.encoder, live.encoder.model, live.index)
            )

        load = [asyncio.create_task(ask(number)) for number in (0, 0, 0, 0, 1, 2, 3, 4)]
        for version in [2, 1, 3, 1] * 3:
            await swap(version)
        done = True
        await asyncio.gather(*load)
        assert asked > 12
        assert len(expected) == 2
        # of the replaced version
        assert (
            await client.post("/search/text", json={"query": next(words)})
        ).is_success
        await swap(2)  # no search follows that would free memory
        for _ in range(50):  # threads of replaced versions may take a moment to end
            # what earlier modules left, and is garbage by now, may hold others
            gc.unfreeze()
            gc.collect()
            alive = {
                (version, type(part).__name__)
                for version, each in seen
                if (part := each()) is not None
            }
            if len(alive) == 3:
                break
            await asyncio.sleep(0.1)
        assert alive == {(2, name) for name in ("DCAR", "Encoder", "IndexVersion")}


def test_start_fails_without_an_index_or_on_a_taken_port(
    tmp_path: Path, built_index: Path
) -> None:
    with pytest.raises(DcarError, match="dcar index build"):
        serve(Settings(index=tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            DcarError, match=f"port {port} of 127.0.0.1: Address already in use"
        ) as caught:
            serve(Settings(index=built_index, port=port))
    assert "\n" not in str(caught.value)
    with pytest.raises(DcarError, match=r"192\.0\.2\.1"):
        serve(Settings(index=built_index, host="192.0.2.1"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=needs("time"))])
def test_server_with_a_broken_index_exits_with_the_reason(
    workers: str, index: Path
) -> None:
    file_of(index, "checkpoint/trainables.safetensors").unlink()
    environment = {
        "DCAR_INDEX": str(index),
        "DCAR_PORT": str(free_port()),
        "DCAR_DEVICE": "cpu",
    }
    process = Command("-c", SERVE, environment=environment | {"DCAR_WORKERS": workers})
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "trainables.safetensors" in log.splitlines()[-1]
    assert workers != "1" or log.count("trainables.safetensors") == 1, "logged once"
