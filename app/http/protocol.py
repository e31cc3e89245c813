"""uvicorn's HTTP/1.1 connection, and what a service without a proxy in front cannot do without.

- A request that offers an upgrade is refused, and its connection closed: the parser would take the body behind the
  offer for the next request.
- A connection whose head is not whole after `HEAD_S` is closed.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 10.0


class Connection(HttpToolsProtocol):
    _timer: asyncio.TimerHandle | None = None  # while a head is expected

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.parser.should_upgrade():
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response("The service offers no upgrade.")
            self.transport.close()
            raise ConnectionError("an offer to upgrade")  # the parser reads no further
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._timer = self._timer or self.loop.call_later(HEAD_S, self.transport.close)
