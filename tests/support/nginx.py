"""A real nginx on loopback."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.paths import ROOT
from tests.support.processes import free_port


@contextmanager
def behind_nginx(folder: Path, *ports: int) -> Iterator[int]:
    """Run nginx, configured by nginx.conf, in front of the services on these ports, and yield its port."""
    port, text = free_port(), (ROOT / "nginx.conf").read_text()
    for old, new in {
        "server dcar:8000 max_fails=0;": "".join(f"server 127.0.0.1:{each} max_fails=0;" for each in ports),
        "listen 8080": f"listen 127.0.0.1:{port}",
        " /tmp/": f" {folder}/",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    command: list[str | Path] = ["nginx", "-e", folder / "errors", "-c", folder / "nginx.conf", "-g", "daemon off;"]
    if os.getuid() == 0:
        command[-1] = "daemon off; user root;"  # which may write to the folder
    process = subprocess.Popen(command)
    try:
        end = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < end:
            try:
                httpx.get(f"http://127.0.0.1:{port}")
                break
            except httpx.TransportError:
                time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        assert process.wait(10) == 0, (folder / "errors").read_text()
