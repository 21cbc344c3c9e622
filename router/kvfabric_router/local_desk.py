"""The desk of the process that decides: what the proxy, or a worker, tells goes into the accounts here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from kvfabric_router.admission import Admission
from kvfabric_router.api import Usage
from kvfabric_router.decision import Outcome
from kvfabric_router.desk import Fault, unless
from kvfabric_router.dispatch import Call, Plan, Planner
from kvfabric_router.fleet import Fleet, ProbeReport
from kvfabric_router.flight import Flight
from kvfabric_router.hints import Hint, hint_of
from kvfabric_router.metrics import RouterMetrics
from kvfabric_router.prefilling import Edge, Prefilling
from kvfabric_router.registry_view import RegistryView

_log = logging.getLogger(__name__)


class LocalDesk:
    """The desk of the process that decides. `hint`: told of what a node should begin to bring."""

    def __init__(
        self,
        planner: Planner,
        fleet: Fleet,
        registry: RegistryView,
        metrics: RouterMetrics,
        hint: Callable[[Hint], None] = lambda _hint: None,
        *,
        edge: Edge,
    ) -> None:
        self.fleet = fleet
        self.hint = hint
        self.edge = edge
        self.lags = planner.lags
        self.registry = registry
        self.metrics = metrics
        self.admission = Admission[LocalAttempt](
            planner,
            fleet,
            metrics=metrics,
            clock=time.monotonic,
            begin=lambda call, plan: LocalAttempt(self, call, plan).begin(),
        )

    async def admit(self, call: Call) -> LocalAttempt:
        return await self.admission.admit(call)


class LocalAttempt:
    """See `Attempt`."""

    def __init__(self, desk: LocalDesk, call: Call, plan: Plan) -> None:
        self._desk = desk
        self._call = call
        self._metrics = desk.metrics.of(call.tenant.tenant_id)
        self.plan = plan
        self.endpoint = plan.engine.endpoint
        self.engine_id = plan.engine.engine_id
        self.session = plan.engine.session
        self.has_handle = plan.has_handle
        self.flight: Flight = desk.fleet.flight(plan.engine.endpoint, plan.sent)
        self._sending = desk.registry.sending(plan.version)
        self._sent: Callable[[], None] = lambda: None
        self._prefilling: Prefilling | None = None
        self._handed_ms: float | None = None

    @property
    def body(self) -> bytes:
        return self._call.request.with_fields(self.plan.fields)

    def begin(self) -> Self:
        """It is in the accounts from here on: of the engine's work, and of what is still to be sent."""
        self._call.tried.add(self.endpoint)
        self.flight.__enter__()
        self._sent = self._sending.__enter__()
        if (hint := hint_of(self.plan)) is not None:
            self._desk.hint(hint)
        if (errand := self.plan.errand) is not None:
            self._prefilling = Prefilling(self._desk.edge, errand, self._call)
        return self

    def abandon(self) -> None:
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._prefilling is not None:
            self._prefilling.stop()
        self._sending.__exit__(None, None, None)
        self.flight.__exit__(kind, error, trace)

    def unless_lost(self) -> asyncio.Timeout:
        return unless(self.flight.when_lost)

    def sent(self) -> None:
        self._sent()

    def first_byte(self, after_s: float) -> None:
        self._metrics.first_byte.observe(after_s)

    def piece(self) -> None:
        if self._prefilling is not None and self.flight.first_byte_at is None:
            computed_at = self._prefilling.computed_at
            if computed_at is None:
                self._prefilling.stop()  # it was waited for long enough
            else:
                self._handed_ms = (time.monotonic() - computed_at) * 1e3
        self.flight.stream_event()

    def answered(self, usage: Usage | None, ttft_ms: float | None) -> None:
        tokens = usage.completion_tokens if usage else 0
        self.flight.answered(usage.work if usage else None, completion_tokens=tokens)
        if usage is None:
            return
        handed = self.plan.choice.handed_tokens
        if self._handed_ms is not None and usage.hbm_tokens + usage.host_tokens >= handed:
            self._desk.lags.saw(self.plan.choice, self._handed_ms)
        self._desk.admission.outcome(
            self._call,
            Outcome(usage.prompt_tokens, usage.work, ttft_ms, usage.miss, usage.completion_tokens),
        )
        mine = self._metrics
        told = usage.hbm_tokens + usage.host_tokens + usage.ssd_tokens + usage.peer_tokens
        mine.prompt_tokens.inc(usage.prompt_tokens)
        mine.reused["hbm"].inc(usage.hbm_tokens)
        mine.reused["host"].inc(usage.host_tokens)
        mine.reused["ssd"].inc(usage.ssd_tokens)
        mine.reused["peer"].inc(usage.peer_tokens)
        mine.reused["any"].inc(max(usage.cached_tokens - told, 0))

    def failed(self, fault: Fault, why: str, report: ProbeReport | None = None) -> None:
        fleet, call = self._desk.fleet, self._call
        if fault is not Fault.BUSY:
            level = logging.INFO if fault is Fault.SESSION else logging.WARNING
            _log.log(level, "request %s: engine %s: %s", call.request_id, self.engine_id, why)
        if fault is Fault.SESSION and report is not None:
            call.tried.discard(self.endpoint)
            fleet.session_moved(self.endpoint, report)
        elif fault in (Fault.LOST, Fault.BROKE_OFF):
            fleet.failed(self.endpoint)
        if fault is not Fault.BROKE_OFF:
            self._desk.metrics.retries.labels(reason=fault.value).inc()
