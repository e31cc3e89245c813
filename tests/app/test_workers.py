"""`dcar serve --workers`: processes that answer as one service."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.commands import Command
from tests.support.processes import is_alive
from tests.support.servers import searching
from tests.support.service import ADMIN, SERVE, bearer, serving_process

pytestmark = pytest.mark.slow
WORKERS = {"DCAR_WORKERS": "2", "DCAR_RUNTIME": "auto", "DCAR_LOG_LEVEL": "warning"}
WRITES = {"DCAR_WRITES": "true", "DCAR_ADMIN_KEY": ADMIN, "DCAR_POLL_S": "0.1"}


class Service:
    """A service of two workers. folder: where it keeps temporary files."""

    def __init__(self, process: Command, url: str, folder: Path) -> None:
        self.process = process
        self.url = url
        self._folder = folder

    def pids(self) -> set[int]:
        """Return the ids of the workers that run and have counted."""
        pids = {
            int(path.stem.split("_")[-1])
            for path in self._folder.glob("*/counter_*.db")
        }
        return {pid for pid in pids if is_alive(pid)}

    def get(self, path: str) -> httpx.Response:
        """Send a request over a connection of its own, which any worker may accept."""
        return httpx.get(
            self.url + path,
            headers=bearer(ADMIN),
            timeout=20,
        )

    def sample(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(self.get("/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def service(
    built_index: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("workers")
    index = Path(shutil.copytree(built_index, root / "index"))
    script = f"import tempfile; tempfile.tempdir = {str(root)!r}; {SERVE}"
    with serving_process(index, script, **WORKERS, **WRITES) as (process, client, _):
        made = Service(process, str(client.base_url).rstrip("/"), root)
        wait(lambda: len(made.pids()) == 2)
        yield made
    wait(lambda: not any(map(is_alive, made.pids())))


def test_workers_share_the_requests_and_add_up_their_metrics(service: Service) -> None:
    def counted() -> dict[str, float]:
        name = "dcar_request_seconds_count"
        return {
            route: service.sample(name, route=route, status="200")
            for route in ("/search/text", "/collections")
        }

    before = counted()
    for _ in range(40):
        assert service.get("/collections").status_code == 200
    assert counted() == {**before, "/collections": before["/collections"] + 40}
    assert service.sample("dcar_index_items") == 24
    with searching(service.url) as statuses:
        wait(lambda: len(statuses) > 100)
    times = [
        Path(f"/proc/{pid}/stat").read_text().split()[13] for pid in service.pids()
    ]
    assert min(map(int, times)) > 0, "each has computed"
    assert set(statuses) == {200}


def test_writes_are_applied_once_and_published_under_load_without_a_failed_request(
    service: Service,
) -> None:
    def patch(number: int) -> str:
        body = {"ids": ["circle/red.png"], "metadata": {f"f{number}": number}}
        answer = httpx.patch(
            service.url + "/items",
            json=body,
            headers=bearer(ADMIN),
            timeout=20,
        )
        assert answer.status_code == 202
        return str(answer.json()["id"])

    before = service.get("/readyz").json()["index_version"]
    with searching(service.url) as statuses:
        jobs = [patch(number) for number in range(6)]
        wait(
            lambda: all(
                service.get(f"/jobs/{job}").json()["status"] == "done" for job in jobs
            )
        )
        last = max(service.get(f"/jobs/{job}").json()["index_version"] for job in jobs)
        wait(lambda: service.get("/readyz").json()["index_version"] == last)
        seen = len(statuses)
        wait(lambda: len(statuses) > seen + 20)
    assert set(statuses) == {200}
    assert before < last <= before + 6
    expected = {f"f{number}": number for number in range(6)}

    def is_seen() -> bool:
        return (
            expected.items()
            <= service.get("/items/circle%2Fred.png").json()["metadata"].items()
        )

    wait(lambda: all(is_seen() for _ in range(8)))


def test_a_killed_worker_is_replaced_and_the_others_go_on(service: Service) -> None:
    before = service.pids()
    victim, other = before
    served = service.sample("dcar_request_seconds_count")
    os.kill(victim, signal.SIGKILL)
    wait(lambda: not is_alive(victim))
    with searching(service.url) as statuses:
        # a silent one has 30 s to answer
        wait(lambda: len(service.pids()) == 2 and victim not in service.pids(), 25)
        wait(lambda: len(statuses) > 50)
    assert other in service.pids()
    assert set(statuses) == {200}, (
        "no connection waits for the killed one, or for one that cannot search yet"
    )
    assert service.sample("dcar_request_seconds_count") > served, (
        "what it counted stays"
    )
