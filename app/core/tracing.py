"""OpenTelemetry traces, when DCAR_TRACING is on: a span for each request, and in it one for each stage of a search.

- FastAPI makes the request's span once a tracer provider is set, and continues the caller's trace (`traceparent`).
- Where spans go is told by OpenTelemetry's own variables: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, ...
- Needs `pip install 'dcar[otel]'`; without the setting nothing of it is imported.
"""

import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from dcar_core.util.errors import MissingExtraError

_LAST_S = 3.0


class Tracer:
    """Makes the spans of stages. `context` is what `current` gave in the task that the work is for.

    close: sends the last spans, in a few seconds or never; to be called at the end, not in the event loop.
    """

    def __init__(self, tracer: Any, current: Callable[[], Any], close: Callable[[], None]) -> None:
        self._tracer = tracer
        self.current = current
        self.close = close

    def span(self, stage: str) -> Any:
        """A context manager around the stage."""
        return self._tracer.start_as_current_span(stage)

    def past(self, stage: str, context: Any, began: float, ended: float, **attributes: int) -> None:
        """A stage that is over. began, ended: of time.monotonic."""
        now = time.time() - time.monotonic()
        span = self._tracer.start_span(
            stage, context=context, start_time=int((now + began) * 1e9), attributes=attributes
        )
        span.end(int((now + ended) * 1e9))


def start_tracing() -> Tracer:
    """Set the process's tracer provider.

    Raises:
        MissingExtraError: OpenTelemetry's SDK is not installed.
    """
    try:
        from opentelemetry import context, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingExtraError("tracing", "otel") from None
    ours = Resource({SERVICE_NAME: "dcar", SERVICE_VERSION: version("dcar")})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

    def close() -> None:
        last = threading.Thread(target=provider.shutdown, daemon=True)  # a collector may accept and never answer
        last.start()
        last.join(_LAST_S)

    return Tracer(provider.get_tracer("dcar"), context.get_current, close)
