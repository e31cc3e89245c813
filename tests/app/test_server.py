"""The server process: starts that fail."""

import socket
from pathlib import Path

import pytest

from app.core.settings import Settings
from app.server import serve
from dcar_core.util.errors import DcarError
from tests.support.commands import Command
from tests.support.processes import free_port
from tests.support.service import SERVE
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
@pytest.mark.parametrize("workers", ["1", "2"])
def test_server_with_a_broken_index_exits_with_the_reason(workers: str, index: Path) -> None:
    file_of(index, "checkpoint/trainables.safetensors").unlink()
    environment = {"DCAR_INDEX": str(index), "DCAR_PORT": str(free_port()), "DCAR_DEVICE": "cpu"}
    process = Command("-c", SERVE, environment=environment | {"DCAR_WORKERS": workers})
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "trainables.safetensors" in log.splitlines()[-1]
    assert workers != "1" or log.count("trainables.safetensors") == 1, "logged once"
