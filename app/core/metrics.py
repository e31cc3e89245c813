"""Prometheus metrics of the service, served at GET /metrics.

- One registry per application, so several applications can live in one process, as in
  tests.
- Several workers count in files of one folder, by prometheus_client's multiprocess
  mode. The worker that is asked adds them up, and reads gauges of its own
  (`add_gauge`).
- Label values come from fixed sets (stages, routes, outcomes), never from what a caller
  sends.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

Stage = Literal["decode", "queue", "encode", "search"]
ReadGauge = Callable[[], Iterable[tuple[str, float]]]  # (label, value) pairs

_SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
# variable of prometheus_client, set before a worker starts
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """All metrics of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=_SECONDS)
        stages = histogram(
            "dcar_stage_seconds",
            "Time a search spends in a stage.",
            ["stage"],
        )
        self.stages: dict[Stage, Histogram] = {
            stage: stages.labels(stage) for stage in get_args(Stage)
        }
        about = "Time from the head of a request to the end of its response."
        self.requests = histogram("dcar_request_seconds", about, ["route", "status"])
        self.batches = histogram(
            "dcar_batch_size",
            "Queries in one forward pass.",
            buckets=_BATCH_SIZES,
        )
        self.lookups = counter(
            "dcar_cache_lookups_total",
            "Lookups of cached embeddings.",
            ["outcome"],
        )
        self.refused = counter(
            "dcar_refused_total",
            "Requests refused to protect the service.",
            ["reason"],
        )
        self.errors = counter("dcar_errors_total", "Unforeseen errors.")
        self.task_failures = counter(
            "dcar_task_failures_total",
            "Failures of background tasks.",
            ["task"],
        )
        self._at_scrape: list[Collector] = []
        if SHARED_FOLDER not in os.environ:
            ProcessCollector(registry=self.registry)

    def add_gauge(self, name: str, about: str, label: str, read: ReadGauge) -> None:
        """Add a gauge that is read from its owner at each scrape."""
        self._at_scrape.append(_ReadAtScrape(name, about, label, read))
        self.registry.register(self._at_scrape[-1])

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        registry = self.registry
        if SHARED_FOLDER in os.environ:
            registry = CollectorRegistry(auto_describe=False)
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            for collector in self._at_scrape:
                registry.register(collector)
        return generate_latest(registry)


@dataclass(eq=False)
class _ReadAtScrape(Collector):
    name: str
    about: str
    label: str
    read: ReadGauge

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self.name, self.about, labels=[self.label])
        for label, value in self.read():
            family.add_metric([label], value)
        return [family]
