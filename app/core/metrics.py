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
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

Stage = Literal["decode", "queue", "encode", "search"]
PendingKind = Literal["searches", "pictures"]
ReadGauge = Callable[[], Iterable[tuple[str, float]]]  # (label, value) pairs

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_CLOSE_TIMEOUT_S = 3.0
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # variable of prometheus_client, set before a worker starts


class Metrics:
    """All metrics of one application. A tracer of OpenTelemetry makes spans of the stages as well."""

    def __init__(self, tracer: Any = None) -> None:
        self._tracer = tracer
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

        self.lookups = counter("dcar_cache_lookups_total", "Lookups of cached embeddings.", "outcome")
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
            with self.span(stage):
                yield
        finally:
            self._stage[stage].observe(time.perf_counter() - started)

    def span(self, stage: Stage) -> AbstractContextManager[Any]:
        """Trace a stage whose time is measured elsewhere."""
        return nullcontext() if self._tracer is None else self._tracer.start_as_current_span(stage)

    def forward_pass(self, arrivals: Sequence[float], started: float, ended: float) -> None:
        """Record a forward pass of queries that arrived at these times."""
        self._batches.observe(len(arrivals))
        self._stage["encode"].observe(ended - started)
        for arrived in arrivals:
            self._stage["queue"].observe(started - arrived)

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
    """Memory, processor time and files of this process, or the sums of all workers."""

    def collect(self) -> Iterable[Metric]:
        found = [[*ProcessCollector(pid=partial(str, pid), registry=None).collect()] for pid in _workers() or ["self"]]
        for families in zip(*filter(None, found), strict=True):  # nothing of one that has ended
            values = [family.samples[0].value for family in families]
            value = min(values) if families[0].name == "process_start_time_seconds" else sum(values)
            families[0].samples = [families[0].samples[0]._replace(value=value)]
            yield families[0]


class _ReadAtScrape(Collector):
    def __init__(self, name: str, description: str, label: str, read: ReadGauge) -> None:
        self._name, self._description, self._label, self._read = name, description, label, read

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._description, labels=[self._label])
        for label, value in self._read():
            family.add_metric([label], value)
        yield family


def start_tracing() -> tuple[Any, Callable[[], None]]:
    """Set the tracer provider of the process; return a tracer, and a function that sends the last spans.

    Raise MissingExtraError if the SDK of OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import trace
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

    return provider.get_tracer("dcar"), close
