"""The server process: start and shutdown."""

import json
import signal
import socket
from pathlib import Path

import pytest
from PIL import Image

from app.core.settings import Settings
from app.server import serve
from dcar_core.util.errors import DcarError
from tests.support.commands import Command
from tests.support.images import encoded
from tests.support.processes import free_port
from tests.support.service import SERVE, serving_process
from tests.support.versions import file_of


def test_start_fails_without_an_index_or_on_a_taken_port(tmp_path: Path, built_index: Path) -> None:
    with pytest.raises(DcarError, match="dcar index build"):
        serve(Settings(index=tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DcarError, match=f"port {port} of 127.0.0.1: Address already in use") as caught:
            serve(Settings(index=built_index, port=port))
    assert "\n" not in str(caught.value)
    with pytest.raises(DcarError, match=r"192\.0\.2\.1"):
        serve(Settings(index=built_index, host="192.0.2.1"))


@pytest.mark.slow
def test_server_process_serves_and_stops(built_index: Path) -> None:
    with serving_process(built_index) as (process, client, log):
        assert client.post("/search/text", json={"query": "red", "k": 2}).json()["results"][0]["rank"] == 1
        big = client.post("/search/image", files={"file": ("big.png", bytes(100 * 2**20))})
        assert big.status_code == 413
        assert "server" not in big.headers
        assert client.get("/nothing").status_code == 404
    text = "\n".join(log)
    assert "Traceback" not in text
    assert "POST /search/text" in text
    assert process.returncode in (0, -signal.SIGTERM)


HANGING = """
from app import server
from app.core.decoders import DecodeWorker
from tests.support.conversions import wait
from tests.support.versions import file_of
run = DecodeWorker.run
DecodeWorker.run = lambda worker, convert, data, limits: run(worker, wait, data, limits)
server.FINISH_S = 1
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_an_image_that_is_decoded_without_end_does_not_keep_the_server(
    built_index: Path, number: signal.Signals, status: int
) -> None:
    with serving_process(built_index, HANGING + SERVE, DCAR_DEADLINE_MS="500") as (process, client, _):
        assert client.post("/search/image", files={"file": encoded(Image.new("L", (4, 4)))}).status_code == 503
        process.send_signal(number)
        assert process.wait(20) == status


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_server_with_a_broken_index_exits_with_the_reason(workers: str, index: Path) -> None:
    file_of(index, "checkpoint/trainables.safetensors").unlink()
    environment = {"DCAR_INDEX": str(index), "DCAR_PORT": str(free_port()), "DCAR_DEVICE": "cpu"}
    process = Command("-c", SERVE, environment=environment | {"DCAR_WORKERS": workers})
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "trainables.safetensors" in log.splitlines()[-1]
    assert workers != "1" or log.count("trainables.safetensors") == 1, "logged once"


FAILING = """
import threading, app.server
def fail(*_, **__):
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    raise {error}
app.server.create_app = fail
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ValueError('a bug')", "app.server.DcarError('a fault')"])
def test_every_line_of_a_failed_start_is_json(error: str, built_index: Path) -> None:
    environment = {"DCAR_INDEX": str(built_index), "DCAR_PORT": "0", "DCAR_LOG_FORMAT": "json"}
    process = Command("-c", FAILING.format(error=error) + SERVE, environment=environment)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    lines = [json.loads(line) for line in log.splitlines()]
    assert any("ZeroDivisionError" in line.get("exc_info", "") for line in lines)
    assert any(error.split("'")[1] in line["message"] for line in lines)
    assert lines[-1]["level"] == "CRITICAL"
