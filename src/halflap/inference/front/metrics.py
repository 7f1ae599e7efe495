"""The front's own numbers for Prometheus, and those of every replica under a label that names it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import httpx2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from halflap.inference.front.replica import Replica
from halflap.inference.server.metrics import SECONDS

PATIENCE = 2.0  # seconds that a replica gets to give its numbers


class FrontMetrics:
    """Names of the front's own begin with `halflap_front_`, so that sums over replicas count nothing twice."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        registry = self._registry = CollectorRegistry()
        self._replicas = replicas
        self.requests = Counter(
            "halflap_front_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.active = Gauge("halflap_front_requests_active", "Requests being answered", registry=registry)
        self.first = Histogram(
            "halflap_front_time_to_first_event_seconds",
            "From body to first event, which comes with the first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.whole = Histogram("halflap_front_request_seconds", "From body to end", buckets=SECONDS, registry=registry)
        self.beginnings = Counter(
            "halflap_front_beginnings",
            "Requests whose beginning the replica had read before (known), or not (new)",
            ["kind"],
            registry=registry,
        )

    async def text(self) -> bytes:
        """All of it, in Prometheus' text format; a replica that does not give its numbers is left out."""
        given = await asyncio.gather(*(_numbers(replica) for replica in self._replicas))
        texts = {str(replica.number): text for replica, text in zip(self._replicas, given) if text}
        own = [*self._registry.collect(), *_states(self._replicas)]
        return generate_latest(_Collected([*own, *merged(texts)]))  # pyright: ignore[reportArgumentType]


def merged(texts: Mapping[str, str]) -> list[Metric]:
    """The metrics in texts of Prometheus' format by replica, each sample with the label `replica`."""
    found: dict[str, Metric] = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text):
            metric = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                metric.add_sample(sample.name, {**sample.labels, "replica": name}, sample.value)
    return list(found.values())


async def _numbers(replica: Replica) -> str | None:
    if not replica.ready:
        return None
    try:
        reply = await replica.client.get("/metrics", timeout=PATIENCE)
    except httpx2.HTTPError:
        return None
    return reply.text if reply.status_code == 200 else None


def _states(replicas: Sequence[Replica]) -> Iterable[Metric]:
    ready = GaugeMetricFamily("halflap_front_replica_ready", "Whether it takes requests", labels=["replica"])
    running = GaugeMetricFamily("halflap_front_replica_running", "Texts that it is writing", labels=["replica"])
    restarts = CounterMetricFamily("halflap_front_replica_restarts", "Starts after the first", labels=["replica"])
    for replica in replicas:
        ready.add_metric([str(replica.number)], float(replica.ready))
        running.add_metric([str(replica.number)], replica.running)
        restarts.add_metric([str(replica.number)], replica.restarts)
    return ready, running, restarts


class _Collected:
    """Metrics in the shape that they are written from."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Sequence[Metric]:
        return self._metrics
