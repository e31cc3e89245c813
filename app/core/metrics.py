"""What the service measures of itself, as GET /metrics shows it to Prometheus.

- One registry per application, so that several live in one process, as they do in tests.
- Children of labelled metrics are looked up once: a cached search takes less than a millisecond, and so must this.
- What is only known when asked (index version, open breakers) is read from its owner at the scrape: see `watch`.
- Labels are taken from fixed sets (stages, routes, outcomes); nothing that a caller sends becomes one.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from app.core.tracing import Tracer

Stage = Literal["cache", "decode", "queue", "encode", "search", "rerank", "explain"]
Level = Literal["memory", "redis"]
Waiting = Literal["searches", "pictures"]
Outcome = Literal["hit", "miss", "error", "skipped", "wrong"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Timed(Protocol):
    """A job of the batcher: when it came, and the trace that it belongs to."""

    arrived: float
    context: Any


class Metrics:
    """Every metric of one application. tracer: also makes spans of the stages, None for no traces."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.tracer = tracer
        self.registry = CollectorRegistry(auto_describe=False)
        self._stages = Histogram(
            "dcar_stage_seconds",
            "Time a search spends in a stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stage = {stage: self._stages.labels(stage) for stage in get_args(Stage)}
        self._requests = Histogram(
            "dcar_request_seconds",
            "Time from the request's head to the end of its answer.",
            ["route", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._request: dict[tuple[str, int], Histogram] = {}
        self._lookups = Counter(
            "dcar_cache_lookups_total",
            "Cached embeddings looked up.",
            ["level", "outcome"],
            registry=self.registry,
        )
        self._lookup: dict[tuple[Level, Outcome], Counter] = {}
        self._writes = Counter(
            "dcar_cache_writes_total", "Embeddings written to Redis.", ["outcome"], registry=self.registry
        )
        self._batches = Histogram(
            "dcar_batch_size", "Queries in one forward pass.", buckets=_SIZES, registry=self.registry
        )
        self._refused = Counter(
            "dcar_refused_total", "Requests refused to protect the service.", ["reason"], registry=self.registry
        )
        self._errors = Counter("dcar_errors_total", "Unforeseen errors.", registry=self.registry)
        pending = Gauge("dcar_pending", "Searches and pictures under way.", ["what"], registry=self.registry)
        self.pending: dict[Waiting, Gauge] = {what: pending.labels(what) for what in get_args(Waiting)}
        ProcessCollector(registry=self.registry)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Measure a stage, whether it ends well or not."""
        began = time.perf_counter()
        try:
            with nullcontext() if self.tracer is None else self.tracer.span(stage):
                yield
        finally:
            self._stage[stage].observe(time.perf_counter() - began)

    def trace_context(self) -> Any:
        """What a job takes along, so that its stages become part of the trace that it is for."""
        return None if self.tracer is None else self.tracer.current()

    def passed(self, jobs: Sequence["Timed"], began: float, ended: float) -> None:
        """A forward pass has been made, for jobs that waited for it. Times are of time.monotonic."""
        self._batches.observe(len(jobs))
        self._stage["encode"].observe(ended - began)
        for job in jobs:
            self._stage["queue"].observe(began - job.arrived)
            if self.tracer is not None:
                self.tracer.past("queue", job.context, job.arrived, began)
                self.tracer.past("encode", job.context, began, ended, **{"dcar.batch_size": len(jobs)})

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered. route: the template, never the path as it was sent."""
        child = self._request.get((route, status))
        if child is None:
            child = self._request[route, status] = self._requests.labels(route, str(status))
        child.observe(seconds)

    def lookup(self, level: Level, outcome: Outcome) -> None:
        """The cache was asked. wrong: it gave a value that is none; skipped: the breaker is open."""
        child = self._lookup.get((level, outcome))
        if child is None:
            child = self._lookup[level, outcome] = self._lookups.labels(level, outcome)
        child.inc()

    def write(self, outcome: Literal["ok", "error", "skipped"]) -> None:
        """An embedding was to be written to Redis."""
        self._writes.labels(outcome).inc()

    def refused(self, reason: str) -> None:
        """A request was refused: queue_full, late, rate, key, body_size, slow_body, ..."""
        self._refused.labels(reason).inc()

    def error(self) -> None:
        """Something happened that should not."""
        self._errors.inc()

    def watch(
        self, name: str, text: str, labels: list[str], read: Callable[[], Iterable[tuple[list[str], float]]]
    ) -> None:
        """Add a gauge that is read from its owner at each scrape. read: label values -> value."""
        self.registry.register(_Watched(name, text, labels, read))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _Watched(Collector):
    def __init__(
        self, name: str, text: str, labels: list[str], read: Callable[[], Iterable[tuple[list[str], float]]]
    ) -> None:
        self._given = name, text, labels
        self._read = read

    def collect(self) -> Iterable[Metric]:
        name, text, labels = self._given
        family = GaugeMetricFamily(name, text, labels=labels)
        for values, value in self._read():
            family.add_metric(values, value)
        yield family
