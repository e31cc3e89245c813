"""A real redis-server on loopback."""

import socket

from tests.support.processes import ServerProcess, free_port


class RedisServer(ServerProcess):
    """A real redis-server on loopback, without persistence. options: more of its command line."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        place = ["--tls-port", str(self.port), "--port", "0"]
        place = place if "--tls-cert-file" in options else ["--port", str(self.port)]
        super().__init__(["redis-server", *options, *place, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])

    def responds(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True
