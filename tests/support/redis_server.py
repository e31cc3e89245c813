"""A real redis-server on loopback."""

import socket
import subprocess
import time

from tests.support.processes import free_port


class RedisServer:
    """A real redis-server on loopback, without persistence. options: more of its command line."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        at = (
            ("--tls-port", str(self.port), "--port", "0")
            if "--tls-cert-file" in self._options
            else ("--port", str(self.port))
        )
        command = ["redis-server", *self._options, *at, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < end, "redis-server does not start"
                time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
