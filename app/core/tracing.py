"""OpenTelemetry traces (DCAR_TRACING): a span for each request, and within it a span for each stage of a search.

- FastAPI makes the span of a request once a tracer provider is set, and continues the caller's trace (`traceparent`).
- OpenTelemetry's own variables say where spans go: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, ...
- Needs `pip install 'dcar[otel]'`. Without the setting OpenTelemetry is not imported.
"""

import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from dcar_core.util.errors import MissingExtraError

_CLOSE_TIMEOUT_S = 3.0


class Tracer:
    """Make the spans of the stages.

    Attributes:
        current: returns the trace context of the current task.
        close: sends the last spans, within a few seconds or never. Blocks: do not call it in the event loop.
    """

    def __init__(self, tracer: Any, current: Callable[[], Any], close: Callable[[], None]) -> None:
        self._tracer = tracer
        self.current = current
        self.close = close

    def span(self, stage: str) -> Any:
        return self._tracer.start_as_current_span(stage)

    def past_span(self, stage: str, context: Any, started: float, ended: float, **attributes: int) -> None:
        """Add the span of a finished stage. Times are of time.monotonic."""
        offset = time.time() - time.monotonic()
        span = self._tracer.start_span(
            stage, context=context, start_time=int((offset + started) * 1e9), attributes=attributes
        )
        span.end(int((offset + ended) * 1e9))


def start_tracing() -> Tracer:
    """Set the tracer provider of the process. Raise MissingExtraError if the SDK of OpenTelemetry is not installed."""
    try:
        from opentelemetry import context, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingExtraError("tracing", "otel") from None
    defaults = Resource({SERVICE_NAME: "dcar", SERVICE_VERSION: version("dcar")})
    provider = TracerProvider(resource=defaults.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

    def close() -> None:
        shutdown = threading.Thread(target=provider.shutdown, daemon=True)  # a collector may accept and never respond
        shutdown.start()
        shutdown.join(_CLOSE_TIMEOUT_S)

    return Tracer(provider.get_tracer("dcar"), context.get_current, close)
