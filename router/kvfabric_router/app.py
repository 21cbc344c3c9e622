"""The HTTP front door: routes, the outer shape of every answer, and what lives as long as the router.

`running(config)` owns everything: the links to the nodes, the prober, the client session, the listener.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from kvfabric import garbage
from kvfabric.config import RouterConfig, split_address
from kvfabric.errors import ConfigError
from kvfabric.events.index import FleetIndex
from kvfabric.registry.lease import EpochLease
from kvfabric.registry.state import Tenant
from kvfabric.supervisor import notify
from kvfabric.tls import Security
from kvfabric_router import api, diagnosis, front
from kvfabric_router.api import ApiError
from kvfabric_router.dispatch import Call, Planner
from kvfabric_router.engine_http import client
from kvfabric_router.explain import explain
from kvfabric_router.fleet import Fleet
from kvfabric_router.journal import Journal
from kvfabric_router.links import Links
from kvfabric_router.load_sharing import share_load
from kvfabric_router.local_desk import LocalDesk
from kvfabric_router.metrics import RouterMetrics
from kvfabric_router.nodes import NodeLink
from kvfabric_router.openapi import document
from kvfabric_router.prefilling import Edge
from kvfabric_router.probes import Prober
from kvfabric_router.proxy import REQUEST_ID, Proxy
from kvfabric_router.registry_view import RegistryView
from kvfabric_router.request_rate import RequestRates
from kvfabric_router.tokenizers import Tokenizers
from kvfabric_router.worker_link import WorkerLink
from kvfabric_router.workers import Workers

MAX_IN_FLIGHT = 2048
_END_S = 2.0
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Router:
    """The parts of one running router."""

    config: RouterConfig
    fleet: Fleet
    index: FleetIndex
    registry: RegistryView
    metrics: RouterMetrics
    planner: Planner
    desk: LocalDesk
    proxy: Proxy[Call]
    links: Links
    rates: RequestRates
    journal: Journal | None = None
    workers: Workers | None = None
    url: str = ""

    def application(self) -> web.Application:
        """The routes, as one table."""
        return front.application(
            [
                web.post(api.COMPLETIONS, self.complete),
                web.post(api.CHAT_COMPLETIONS, self.complete),
                web.get("/v1/models", self.models),
                web.get("/v1/explain/{request_id}", self.explain),
                web.get("/doctor", self.doctor),
                web.get("/healthz", self.healthz),
                web.get("/readyz", self.readyz),
                web.get("/metrics", self.metrics_text),
                web.get("/openapi.json", self.describe),
            ]
        )

    # ------------------------------------------------------------------ the OpenAI API

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """A completion, of a text or of a chat."""
        request_id = f"req-{secrets.token_hex(16)}"
        tenant, call = "", None
        try:
            tenant = self.enter(request.headers.get("Authorization")).tenant_id
            call = await self._call(request, request_id)
            response = await self.proxy.serve(request, call)
        except ApiError as exc:
            response = front.error_response(exc)
        except web.HTTPRequestEntityTooLarge as exc:
            response = front.error_response(front.too_large(exc))
        except (asyncio.CancelledError, ConnectionError):
            self.left(tenant, "disconnected")
            raise
        if not response.prepared:
            response.headers.setdefault(REQUEST_ID, request_id)
        self.left(tenant, (call.result if call else "") or str(response.status))
        return response

    async def _call(self, request: web.Request, request_id: str) -> Call:
        """Raises ApiError 400, 401."""
        raw = await request.read()
        asked = front.directives(request)
        return Call(
            ttft_ms=asked.ttft_ms,
            request_id=request_id,
            tenant=self.again(request.headers.get("Authorization")),
            request=api.parse(request.path, raw),
            no_store=asked.no_store,
            no_read=asked.no_read,
        )

    # ------------------------------------------------------------------ who may ask (`worker_link.Door`)

    def enter(self, authorization: str | None) -> Tenant:
        """Whose request it is. Raises ApiError 401, 429 or 503."""
        tenant = self.registry.authenticate(authorization)
        self.rates.take(tenant)
        if self.fleet.num_flights >= MAX_IN_FLIGHT:
            raise ApiError(429, "The router has as many requests as it takes.", code="overloaded")
        return tenant

    def again(self, authorization: str | None) -> Tenant:
        """The key may have been revoked while a body came. Raises ApiError 401 or 503."""
        return self.registry.authenticate(authorization)

    def left(self, tenant: str, result: str) -> None:
        self.metrics.requests.labels(tenant=tenant, result=result).inc()

    async def models(self, request: web.Request) -> web.Response:
        """The models that engines serve now."""
        self.registry.authenticate(request.headers.get("Authorization"))
        names = sorted({engine.model_name for engine in self.fleet.view().engines})
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "kvfabric"} for name in names
        ]
        return front.json_response({"object": "list", "data": data})

    async def explain(self, request: web.Request) -> web.Response:
        """Why a recent request of this tenant went where it went, and reused what it reused."""
        tenant = self.registry.authenticate(request.headers.get("Authorization"))
        request_id = request.match_info["request_id"]
        found = self.planner.decision(request_id, tenant.tenant_id)
        if found is None:
            raise ApiError(404, "No recent request of yours has this id.", code="unknown_request")
        node = found.ranked[0].candidate.engine.node_id
        told = await self.links.lookup(node, request_id, tenant.tenant_id)
        return front.json_response(explain(request_id, found, told))

    # ------------------------------------------------------------------ for operators

    async def healthz(self, request: web.Request) -> web.Response:
        """The process serves."""
        return front.json_response({"status": "ok"})

    async def readyz(self, request: web.Request) -> web.Response:
        """Requests are answered well: tenants and what nodes hold are known, an engine takes requests."""
        parts = {
            "registry": self.registry.state is not None,
            "engines": self.fleet.counts()["taking"] > 0,
            "index": self.links.are_known,
        }
        # For information: without these requests are answered too, but reuse nothing or less.
        details = {
            "epoch_lease": self.registry.usable() is not None,
            "nodes_connected": self.links.num_connected,
        }
        ready = all(parts.values())
        return front.json_response(
            {"ready": ready, **parts, **details}, status=200 if ready else 503
        )

    async def doctor(self, request: web.Request) -> web.Response:
        """What is wrong without anybody noticing, for `kvfabric doctor ROUTER_URL`."""
        totals = self.metrics.totals(self.index.statistics().num_blocks)
        found = diagnosis.examine(self.links.sights(), self.fleet.sights(), totals)
        return front.json_response({"findings": found})

    async def describe(self, request: web.Request) -> web.Response:
        """This API as an OpenAPI document."""
        return front.json_response(document())

    async def metrics_text(self, request: web.Request) -> web.Response:
        """Prometheus metrics."""
        for result, number in self.fleet.counts().items():
            self.metrics.engines.labels(result=result).set(number)
        self.metrics.in_flight.set(self.fleet.num_flights)
        self.metrics.lease.set(self.registry.usable() is not None)
        index = self.index.statistics()
        self.metrics.index_blocks.set(index.num_blocks)
        self.metrics.index_bytes.set(index.num_bytes)
        return web.Response(
            body=self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )


def security_of(config: RouterConfig) -> Security:
    """How this router reaches nodes."""
    return Security("router", config.tls_path if config.tls_dir else None, config.insecure)


def _build(config: RouterConfig, http: aiohttp.ClientSession) -> Router:
    tokenizers = Tokenizers(config.tokenizers)
    fleet = Fleet(clock=time.monotonic, tokenizers=tokenizers)
    fleet.configure(config.engines)
    index = FleetIndex(capacity=1 << 16)
    registry = RegistryView(lease=EpochLease(), tokenizers=tokenizers)
    metrics = RouterMetrics()
    journal = None
    if config.journal_dir:
        journal = Journal(
            Path(config.journal_dir).expanduser(),
            state_dir=config.state_dir,
            max_bytes=config.journal_bytes,
            dropped=lambda lines: metrics.journal_dropped.inc(lines),
        )
    planner = Planner(config, fleet=fleet, index=index, registry=registry, metrics=metrics)
    planner.journal = journal
    if journal is not None:
        journal.capacities = fleet.topology.capacities

    security = security_of(config)

    def link(target: str, is_first: bool) -> NodeLink:
        return NodeLink(
            target,
            fleet=fleet,
            index=index,
            registry=registry if is_first and not config.directory else None,
            metrics=metrics,
            security=security,
        )

    links = Links(link, config.node_targets)
    edge = Edge(http, fleet, registry, metrics, links.end_handoff)
    desk = LocalDesk(planner, fleet, registry, metrics, links.hint, edge=edge)
    proxy = Proxy(desk, http=http, timeout_s=config.request_timeout_s)
    rates = RequestRates(time.monotonic)
    router = Router(
        config, fleet, index, registry, metrics, planner, desk, proxy, links, rates, journal
    )
    if config.workers == 1:
        return router
    workers = Workers(
        config.workers,
        link=lambda group: WorkerLink(desk, router, group),
        timeout_s=config.request_timeout_s,
        log_level=config.log_level.upper(),
    )
    return dataclasses.replace(router, workers=workers)


@contextlib.asynccontextmanager
async def running(config: RouterConfig) -> AsyncIterator[Router]:
    """A router that listens, with its links and probes, until the block ends.

    On the way out: no new connections, answers in progress get `front.STOP_S` to end, then all is closed.
    Raises ConfigError if the address cannot be listened on.
    """
    async with client() as http:
        router = _build(config, http)
        async with contextlib.AsyncExitStack() as stack:
            if router.journal is not None:
                await stack.enter_async_context(router.journal.writing())
            found: Callable[[], tuple[str, ...]] = tuple
            work = [Prober(router.fleet, http).run()]
            if config.directory:
                # Imported here: Redis and LMDB are there only where a directory is used.
                from kvfabric_router import directory

                registry = await stack.enter_async_context(
                    directory.join(config, router.registry, router.planner.keyring)
                )
                found = functools.partial(directory.node_targets, registry)
                work.append(directory.follow(registry, router.registry))
                work.append(share_load(router.fleet, registry.exchange_load))
                keys = directory.fleet_keys(registry, router.planner.keyring, security_of(config))
                work.append(keys.run())
            work.append(router.links.run(found))
            work.append(garbage.collect(lambda: asyncio.sleep(0)))
            await stack.enter_async_context(_background(*work))
            url = await stack.enter_async_context(_listening(router))
            stack.enter_context(garbage.own_schedule())
            yield dataclasses.replace(router, url=url)


@contextlib.asynccontextmanager
async def _background(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` while the block runs. A fault in either ends both, and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
            try:
                yield
            finally:
                await _end(tasks)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel them until they have ended. Once is not always enough: where Redis hangs, what its client does
    to leave a cancelled call ends in an error of its own, which looks like any other failure."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_END_S)


@contextlib.asynccontextmanager
async def _listening(router: Router) -> AsyncIterator[str]:
    config = router.config
    host, port = split_address(config.listen, "router.listen")
    if router.workers is not None:
        async with router.workers.running(router.application(), host, port) as url:
            yield url
        return
    async with front.serving(router.application()) as runner:
        try:
            await web.TCPSite(runner, host, port, backlog=front.BACKLOG).start()
        except OSError as exc:
            raise ConfigError(
                f"router.listen: cannot listen on {host}:{port}: {exc.strerror}"
            ) from exc
        address = runner.addresses[0]
        yield f"http://{address[0]}:{address[1]}"


async def serve_until_stopped(config: RouterConfig) -> None:
    """Serve until SIGTERM or SIGINT, then stop gracefully."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(config) as router:
        print(f"kvfabric router ready: {router.url}", file=sys.stderr, flush=True)
        notify("READY=1")
        await stop.wait()
