"""Traces of a real server, received by an OTLP collector over HTTP."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.parts import needs
from tests.support.processes import answering
from tests.support.service import serving_process

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

pytestmark = needs("otel")


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import gzip

            data = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with answering(server):
        yield f"http://127.0.0.1:{server.server_address[1]}", spans


@pytest.mark.slow
def test_stages_are_spans_in_the_trace_of_the_caller(built_index: Path, collector: tuple[str, list[Any]]) -> None:
    url, spans = collector
    with serving_process(built_index, DCAR_TRACING="true", OTEL_EXPORTER_OTLP_ENDPOINT=url) as (_, client, log):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert client.post("/search/text", json={"query": "red"}, headers=headers).status_code == 200
    assert "Traceback" not in "".join(log)
    ours = {span.name: span for span in spans if span.trace_id.hex() == TRACE}
    request = next(span for span in ours.values() if span.parent_span_id.hex() == PARENT)
    assert "/search/text" in request.name
    for stage in ("cache", "encode", "search"):
        assert request.start_time_unix_nano <= ours[stage].start_time_unix_nano
        assert ours[stage].end_time_unix_nano <= request.end_time_unix_nano
