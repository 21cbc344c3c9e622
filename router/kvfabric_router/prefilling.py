"""A prompt computed at one engine for another: the request to the first, beside the one to the second.

It asks for one token, as a sign that all blocks are on their way. It is accounted for as any request to that
engine is, teaches its rates, and ends with the attempt at the second engine, whose answer it is for. If it
fails, the node of the second engine hears so at once, and that engine computes the rest itself: a fault here
never fails a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from kvfabric.errors import TransferError
from kvfabric.handle import SESSION_HEADER
from kvfabric.types import NodeId, TenantId
from kvfabric_router.api import EventSplitter, Usage, decode_answer, events_of, parse_usage
from kvfabric_router.desk import Fault, unless
from kvfabric_router.engine_http import FAULTS, MISDIRECTED, Body, is_stream, words_of
from kvfabric_router.fleet import Fleet, ProbeReport
from kvfabric_router.flight import Sent
from kvfabric_router.metrics import RouterMetrics
from kvfabric_router.policy import EngineView
from kvfabric_router.probes import read_report
from kvfabric_router.registry_view import RegistryView

if TYPE_CHECKING:
    from kvfabric_router.dispatch import Call

REQUEST_ID = "X-Request-Id"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Errand:
    """What to send to the engine that computes. `name`: of the hand-off; `to`: the node that waits."""

    name: str
    to: NodeId
    engine: EngineView
    path: str
    body: bytes
    request_id: str
    sent: Sent
    version: int


class _Refused(TransferError):
    """`report`: what an engine that started anew is now."""

    def __init__(self, why: str, fault: Fault, report: ProbeReport | None = None) -> None:
        super().__init__(why)
        self.fault = fault
        self.report = report


@dataclass(frozen=True, slots=True)
class Edge:
    """What errands work with. `end`: tells a node that nobody computes a hand-off any more."""

    http: aiohttp.ClientSession
    fleet: Fleet
    registry: RegistryView
    metrics: RouterMetrics
    end: Callable[[NodeId, str, TenantId], Awaitable[None]]


class Prefilling:
    """One errand under way, from its constructor on; `stop` ends it. `computed_at`: monotonic seconds, of its
    first sign."""

    def __init__(self, edge: Edge, errand: Errand, call: Call) -> None:
        self._edge = edge
        self._errand = errand
        self._call = call
        self.computed_at: float | None = None
        self._flight = edge.fleet.flight(errand.engine.endpoint, errand.sent)
        self._sending = edge.registry.sending(errand.version)
        self._flight.__enter__()
        self._sent = self._sending.__enter__()
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._ended)

    def __repr__(self) -> str:
        return f"<Prefilling {self._errand.name} at {self._errand.engine.engine_id}>"

    def stop(self) -> None:
        """Nobody needs it any more. Idempotent."""
        self._task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._sending.__exit__(None, None, None)
        self._flight.__exit__(None, None, None)
        result = "stopped" if task.cancelled() else "failed"
        if self.computed_at is not None:
            result = "computed"
        self._edge.metrics.handoffs.labels(result=result).inc()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%r failed", self, exc_info=error)

    async def _run(self) -> None:
        try:
            async with unless(self._flight.when_lost):
                await self._ask()
        except _Refused as exc:
            await self._failed(exc.fault, str(exc), exc.report)
        except FAULTS as exc:
            await self._failed(Fault.LOST, words_of(exc))

    async def _ask(self) -> None:
        """Raises _Refused and FAULTS."""
        errand = self._errand
        headers = {
            "Content-Type": "application/json",
            REQUEST_ID: errand.request_id,
            SESSION_HEADER: errand.engine.session.hex(),
        }
        url = errand.engine.endpoint + errand.path
        data = Body(errand.body, self._sent)
        async with self._edge.http.post(url, data=data, headers=headers) as answer:
            if not is_stream(answer):
                raise _refused(answer.status, await answer.read(), errand.engine.session)
            usage = await self._read(answer)
        if self.computed_at is None:
            raise _Refused("it ended the stream before the first byte", Fault.LOST)
        self._flight.answered(usage.work if usage else None, completion_tokens=1)

    async def _read(self, answer: aiohttp.ClientResponse) -> Usage | None:
        splitter, usage = EventSplitter(), None
        while piece := await answer.content.readany():
            if self.computed_at is None:
                self.computed_at = time.monotonic()
            self._flight.stream_event()
            for data in events_of(splitter.feed(piece)):
                usage = parse_usage(decode_answer(data)) or usage
        return usage

    async def _failed(self, fault: Fault, why: str, report: ProbeReport | None = None) -> None:
        edge, errand, call = self._edge, self._errand, self._call
        _log.warning(
            "request %s: prompt at engine %s: %s", call.request_id, errand.engine.engine_id, why
        )
        if fault is Fault.SESSION and report is not None:
            edge.fleet.session_moved(errand.engine.endpoint, report)
        else:
            call.tried.add(errand.engine.endpoint)
        if fault is Fault.LOST:
            edge.fleet.failed(errand.engine.endpoint)
        await edge.end(errand.to, errand.name, call.tenant.tenant_id)


def _refused(status: int, raw: bytes, session: bytes) -> _Refused:
    report = read_report(decode_answer(raw)) if status == MISDIRECTED else None
    if report is not None and report.session != session:
        return _Refused(f"its session is {report.session.hex()} now", Fault.SESSION, report)
    return _Refused(f"status {status}", Fault.BUSY)
