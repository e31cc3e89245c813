"""Prometheus metrics of the service, served at GET /metrics, and OpenTelemetry traces (DCAR_TRACING).

- One registry per application, so several applications can live in one process, as in tests.
- Values that only their owner knows (index version, open circuit breakers) are read at each scrape: see `add_gauge`.
- Traces have a span for each request, which FastAPI makes once a tracer provider is set, and within it a span for each
  stage of a search. OpenTelemetry's own variables say where spans go: OTEL_EXPORTER_OTLP_ENDPOINT, ...
- Without the setting OpenTelemetry is not imported.
- Several workers count in files of one folder, by prometheus_client's multiprocess mode. The worker that is asked adds
  them up, and reads its own values of `add_gauge`.
- Label values come from fixed sets (stages, routes, outcomes), never from what a caller sends.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from dcar_core.util.errors import MissingExtraError

Stage = Literal["cache", "decode", "queue", "encode", "search", "rerank", "explain"]
PendingKind = Literal["searches", "pictures"]
ReadGauge = Callable[[], Iterable[tuple[str, float]]]  # (label, value) pairs

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_CLOSE_TIMEOUT_S = 3.0
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # variable of prometheus_client, set before a worker starts


class Tracer:
    """Make the spans of the stages. `current` gives the trace context of a task, and `close` sends the last spans."""

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


class Metrics:
    """All metrics of one application. A tracer makes spans of the stages as well."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.tracer = tracer
        self.registry = registry = CollectorRegistry(auto_describe=False)
        stages = Histogram(
            "dcar_stage_seconds", "Time a search spends in a stage.", ["stage"], buckets=_SECONDS, registry=registry
        )
        self._stage = {stage: stages.labels(stage) for stage in get_args(Stage)}
        self.requests = Histogram(
            "dcar_request_seconds",
            "Time from the head of a request to the end of its response.",
            ["route", "status"],
            buckets=_SECONDS,
            registry=registry,
        )

        def counter(name: str, description: str, *labels: str) -> Counter:
            return Counter(name, description, labels, registry=registry)

        self.lookups = counter("dcar_cache_lookups_total", "Lookups of cached embeddings.", "level", "outcome")
        self.writes = counter("dcar_cache_writes_total", "Embeddings written to Redis.", "outcome")
        self.refused = counter("dcar_refused_total", "Requests refused to protect the service.", "reason")
        self.errors = counter("dcar_errors_total", "Unforeseen errors.")
        self.task_failures = counter("dcar_task_failures_total", "Failures of background tasks.", "task")
        self._batches = Histogram(
            "dcar_batch_size", "Queries in one forward pass.", buckets=_BATCH_SIZES, registry=registry
        )
        pending = Gauge(
            "dcar_pending", "Searches and image requests in progress.", ["what"], registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self.pending: dict[PendingKind, Gauge] = {kind: pending.labels(kind) for kind in get_args(PendingKind)}
        self._at_scrape: list[Collector] = [_Processes()]
        registry.register(self._at_scrape[0])

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Measure a stage, whether it succeeds or fails."""
        started = time.perf_counter()
        try:
            with nullcontext() if self.tracer is None else self.tracer.span(stage):
                yield
        finally:
            self._stage[stage].observe(time.perf_counter() - started)

    def trace_context(self) -> Any:
        """Return the trace context of the current request, for work that is done in another task."""
        return None if self.tracer is None else self.tracer.current()

    def forward_pass(self, jobs: Sequence[tuple[float, Any]], started: float, ended: float) -> None:
        """Record a forward pass. jobs: their arrivals and trace contexts. Times are of time.monotonic."""
        self._batches.observe(len(jobs))
        self._stage["encode"].observe(ended - started)
        for arrived, context in jobs:
            self._stage["queue"].observe(started - arrived)
            if self.tracer is not None:
                self.tracer.past_span("queue", context, arrived, started)
                self.tracer.past_span("encode", context, started, ended, **{"dcar.batch_size": len(jobs)})

    def add_gauge(self, name: str, description: str, label: str, read: ReadGauge) -> None:
        """Add a gauge that is read from its owner at each scrape."""
        gauge = _ReadAtScrape(name, description, label, read)
        self._at_scrape.append(gauge)
        self.registry.register(gauge)

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        registry = self.registry
        if SHARED_FOLDER in os.environ:
            registry = CollectorRegistry(auto_describe=False)
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            for collector in self._at_scrape:
                registry.register(collector)
        return generate_latest(registry)


def drop_dead_workers() -> None:
    """Remove the gauges of workers that have ended."""
    for pid in _workers():
        if not Path("/proc", pid).exists():
            mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _workers() -> list[str]:
    """Return the ids of the workers that have counted; none for a process on its own."""
    folder = os.environ.get(SHARED_FOLDER)
    return [path.stem.split("_")[-1] for path in Path(folder).glob("gauge_live*.db")] if folder else []


class _Processes(Collector):
    """Memory, processor time and files of this process, or the sums of all workers.

    Processor time includes that of workers that have ended, since a counter that falls looks like one that began anew.
    """

    def collect(self) -> Iterable[Metric]:
        workers, found = _workers(), dict[str, list[Metric]]()
        for pid in workers or ["self"]:
            for family in ProcessCollector(pid=partial(str, pid), registry=None).collect():
                found.setdefault(family.name, []).append(family)
        for name, families in found.items():
            values = [family.samples[0].value for family in families]
            value = min(values) if name == "process_start_time_seconds" else sum(values)
            value += _ended_seconds() if workers and name == "process_cpu_seconds" else 0
            families[0].samples = [families[0].samples[0]._replace(value=value)]
            yield families[0]


def _ended_seconds() -> float:
    """Return the processor time of this worker's siblings that have ended."""
    fields = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")  # cutime, cstime


class _ReadAtScrape(Collector):
    def __init__(self, name: str, description: str, label: str, read: ReadGauge) -> None:
        self._name, self._description, self._label, self._read = name, description, label, read

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._description, labels=[self._label])
        for label, value in self._read():
            family.add_metric([label], value)
        yield family


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
