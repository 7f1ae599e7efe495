"""Counters and times of a server for Prometheus, and the engine's own numbers beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from halflap.inference.requests import Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Every name begins with `halflap_`; a registry of its own, so that servers in one process do not mix."""

    def __init__(self, engine: Callable[[], Mapping[str, Any]]) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "halflap_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.active = Gauge("halflap_requests_active", "Requests being answered", registry=registry)
        self.tokens = Counter("halflap_tokens", "Tokens: prompt, cached, completion", ["kind"], registry=registry)
        self.first = Histogram(
            "halflap_time_to_first_token_seconds", "From body to first piece", buckets=SECONDS, registry=registry
        )
        self.between = Histogram(
            "halflap_time_between_pieces_seconds", "Between pieces of a request", buckets=BETWEEN, registry=registry
        )
        self.whole = Histogram("halflap_request_seconds", "From body to end", buckets=SECONDS, registry=registry)
        registry.register(_Engine(engine))  # pyright: ignore[reportArgumentType]

    def count(self, usage: Usage) -> None:
        self.tokens.labels("prompt").inc(usage.prompt_tokens)
        self.tokens.labels("cached").inc(usage.cached_tokens)
        self.tokens.labels("completion").inc(usage.completion_tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engine:
    """The numbers of `Engine.stats()` as `halflap_engine_NAME`; those of a table within carry a label `kind`."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        for name, value in self._stats().items():
            if name == "time":
                continue
            values = value if isinstance(value, Mapping) else {"": value}
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            if not numbers:
                continue
            labels = ["kind"] if isinstance(value, Mapping) else []
            gauge = GaugeMetricFamily(f"halflap_engine_{name}", f"{name} of the engine", labels=labels)
            for kind, number in numbers.items():
                gauge.add_metric([kind] if labels else [], number)
            yield gauge
