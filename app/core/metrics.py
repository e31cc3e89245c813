"""Prometheus metrics of the service, served at GET /metrics.

- One registry per application, so several applications can live in one process, as in tests.
- Values that only their owner knows (index version, open circuit breakers) are read at each scrape: see `add_gauge`.
- Label values come from fixed sets (stages, routes, outcomes), never from what a caller sends.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from app.core.tracing import Tracer

Stage = Literal["cache", "decode", "queue", "encode", "search", "rerank", "explain"]
PendingKind = Literal["searches", "pictures"]
ReadGauge = Callable[[], Iterable[tuple[list[str], float]]]  # (label values, value) pairs

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


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
        pending = Gauge("dcar_pending", "Searches and image requests in progress.", ["what"], registry=registry)
        self.pending: dict[PendingKind, Gauge] = {kind: pending.labels(kind) for kind in get_args(PendingKind)}
        ProcessCollector(registry=registry)

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

    def add_gauge(self, name: str, description: str, labels: list[str], read: ReadGauge) -> None:
        """Add a gauge that is read from its owner at each scrape."""
        self.registry.register(_ReadAtScrape(name, description, labels, read))

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class _ReadAtScrape(Collector):
    def __init__(self, name: str, description: str, labels: list[str], read: ReadGauge) -> None:
        self._name = name
        self._description = description
        self._labels = labels
        self._read = read

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._description, labels=self._labels)
        for values, value in self._read():
            family.add_metric(values, value)
        yield family
