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
def behind_nginx(folder: Path, *replicas: int) -> Iterator[str]:
    """Run nginx in front of services on two ports, and yield its URL."""
    port, text = free_port(), (ROOT / "nginx.conf").read_text()
    for old, new in zip(("api:8000", "replica:8000"), replicas, strict=True):
        text = text.replace(f"server {old}", f"server 127.0.0.1:{new}")
    text = text.replace("listen 8080", f"listen 127.0.0.1:{port}").replace(" /tmp/", f" {folder}/")
    (folder / "nginx.conf").write_text(text)
    command: list[str | Path] = ["nginx", "-e", folder / "errors", "-c", folder / "nginx.conf", "-g", "daemon off;"]
    if os.getuid() == 0:
        command[-1] = "daemon off; user root;"  # which may write to the folder
    process = subprocess.Popen(command)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 20
        while process.poll() is None and time.monotonic() < end:
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        assert process.wait(10) == 0, (folder / "errors").read_text()
