"""What an engine and its server have done, for Prometheus. Nothing is counted twice: a scrape reads the statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tdc_fast.serving.engine import Engine
from tdc_fast.serving.statistics import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """The metrics of an engine and of the answers of its server.

    Args:
        engine: what is measured.

    Attributes:
        responses: answers by path and status; 499 where the client had left.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.responses: Counter[tuple[str, int]] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The metrics, as they are now."""
        load, statistics = self._engine.load(), self._engine.statistics
        yield GaugeMetricFamily("tdc_queue_requests", "Requests that wait for their first step", load["waiting"])
        yield GaugeMetricFamily("tdc_running_requests", "Requests that have begun", load["running"])
        yield GaugeMetricFamily("tdc_batch_places", "Places in a batch now", self._engine.places)
        with statistics.lock:
            requests = CounterMetricFamily("tdc_requests", "Requests by how they ended", labels=["outcome"])
            for outcome, count in sorted(statistics.outcomes.items()):
                requests.add_metric([outcome], count)
            yield requests
            yield CounterMetricFamily("tdc_images", "Images completed", statistics.images)
            yield CounterMetricFamily("tdc_steps", "Denoising steps of a batch", statistics.steps)
            yield CounterMetricFamily("tdc_failed_steps", "Steps that raised an error", statistics.failed_steps)
            yield CounterMetricFamily("tdc_batch_rows", "Places that were filled, over all steps", statistics.rows)
            yield CounterMetricFamily(
                "tdc_batch_padding", "Places that only filled a bucket, over all steps", statistics.padding
            )
            experts = CounterMetricFamily("tdc_expert_rows", "Filled places by expert", labels=["expert"])
            for expert, rows in enumerate(statistics.expert_rows.tolist()):
                experts.add_metric([str(expert)], rows)
            yield experts
            yield CounterMetricFamily("tdc_forward_seconds", "Time in the denoiser", statistics.forward_seconds)
            yield _histogram("tdc_step_seconds", "Time of a step with everything around it", statistics.step_seconds)
            yield _histogram("tdc_latency_seconds", "Time of completed requests", statistics.latency_seconds)
            yield _histogram("tdc_waiting_seconds", "Their time until the first step", statistics.waiting_seconds)
        responses = CounterMetricFamily("tdc_http_responses", "Answers by path and status", labels=["path", "status"])
        for (path, status), count in sorted(self.responses.items()):
            responses.add_metric([path, str(status)], count)
        yield responses


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, histogram.cumulative(), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.total)
