"""/metrics, /healthz and /readyz of a node. Reads statistics, changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvfabric.errors import ConfigError
from kvfabric.metrics import NODE_METRICS, Distribution, Sample, by_name

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Samples(Collector):
    """Statistics as Prometheus metrics; only what the table in `kvfabric.metrics` names."""

    def __init__(self, samples: Callable[[], Iterable[Sample | Distribution]]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        table = by_name(NODE_METRICS)
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for sample in self._samples():
            metric = table[sample.name]
            if isinstance(sample, Distribution):
                values = sample.values
                yield HistogramMetricFamily(
                    metric.name, metric.help, buckets=values.buckets(), sum_value=values.total
                )
                continue
            family = families.get(metric.name)
            if family is None:
                kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                family = families[metric.name] = kind(
                    metric.name, metric.help, labels=metric.labels
                )
            family.add_metric(sample.labels, sample.value)
        yield from families.values()


class HttpServer:
    """An async context manager. `address` is where it listens (the port that was given for 0)."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        samples: Callable[[], Iterable[Sample | Distribution]],
        not_ready: Callable[[], str],
        degraded: Callable[[], str],
    ) -> None:
        """`not_ready`: why the node should get no traffic yet; `degraded`: what of it is out of service
        while the rest serves. Empty: nothing is to be said."""
        self._host, self._port = host, port
        self._not_ready = not_ready
        self._degraded = degraded
        self._registry = CollectorRegistry()
        self._registry.register(_Samples(samples))
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._metrics),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        self.address = f"{host}:{port}"

    async def __aenter__(self) -> HttpServer:
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as exc:
            await self._runner.cleanup()
            raise ConfigError(f"cannot listen on {self.address}: {exc.strerror}") from exc
        self.address = "{}:{}".format(*self._runner.addresses[0][:2])
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        reason, degraded = self._not_ready(), self._degraded()
        text = reason or (f"ok, degraded: {degraded}" if degraded else "ok")
        return web.Response(text=f"{text}\n", status=503 if reason else 200)
