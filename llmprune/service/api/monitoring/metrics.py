"""Metrics for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmprune.service.jobs.store import JobStore


class Metrics:
    """Registry of the metrics of one app."""

    def __init__(self, jobs: JobStore) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "llmprune_http_requests",
            "Requests by route and status",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "llmprune_http_seconds", "Seconds until the answer begins", ["route"], registry=self.registry
        )
        self.registry.register(_States(jobs))

    def render(self) -> tuple[bytes, str]:
        """Return all metrics as text, and the content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _States(Collector):
    """Gauge of the jobs in each state, read from the job table at each scrape."""

    def __init__(self, jobs: JobStore) -> None:
        self.jobs = jobs

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("llmprune_jobs", "Jobs by state", labels=["state"])
        for state, number in self.jobs.counts(viewer=None).items():
            family.add_metric([state], number)
        yield family


class MetricsMiddleware:
    """ASGI middleware that counts and times requests by route."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: PLR0917 - ASGI
        """Pass a request on, and count its answer."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start = time.perf_counter()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")  # never the path, which clients can make up
                method = scope["method"] if scope["method"] in METHODS else "other"
                self.metrics.requests.labels(method, route, message["status"]).inc()
                self.metrics.seconds.labels(route).observe(time.perf_counter() - start)
            await send(message)

        await self.app(scope, receive, sending)
        return None


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
