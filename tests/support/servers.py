"""Real servers on loopback, and searches without pause while something happens to
one.
"""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.paths import ROOT
from tests.support.processes import ServerProcess, free_port


class RedisServer(ServerProcess):
    """A real redis-server on loopback, without persistence. options: more of its
    command line.
    """

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        place = ["--tls-port", str(self.port), "--port", "0"]
        place = place if "--tls-cert-file" in options else ["--port", str(self.port)]
        super().__init__(
            [
                "redis-server",
                *options,
                *place,
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
            ]
        )

    def responds(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True


@contextmanager
def behind_nginx(folder: Path, *ports: int) -> Iterator[int]:
    """Run nginx, configured by nginx.conf, in front of the services on these ports, and
    yield its port.
    """
    port = free_port()
    text = (ROOT / "nginx.conf").read_text()
    for old, new in {
        "server dcar:8000 max_fails=0;": "".join(
            f"server 127.0.0.1:{each} max_fails=0;" for each in ports
        ),
        "listen 8080": f"listen 127.0.0.1:{port}",
        " /tmp/": f" {folder}/",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    command: list[str | Path] = [
        "nginx",
        "-e",
        folder / "errors",
        "-c",
        folder / "nginx.conf",
        "-g",
        "daemon off;",
    ]
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


@contextmanager
def searching(url: str) -> Iterator[list[int]]:
    """Search from a few threads, over new connections and kept ones; yield the
    statuses. -1: results are missing.
    """
    statuses = list[int]()
    is_over = threading.Event()

    def search(number: int) -> None:
        with httpx.Client(timeout=20) as client:
            while not is_over.is_set():
                send = client.post if number % 2 else httpx.post
                answer = send(
                    f"{url}/search/text",
                    json={"query": f"red {len(statuses)} {number}", "k": 5},
                    timeout=20,
                )
                is_whole = (
                    answer.status_code != 200 or len(answer.json()["results"]) == 5
                )
                statuses.append(answer.status_code if is_whole else -1)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        is_over.set()
        for thread in threads:
            thread.join(30)
