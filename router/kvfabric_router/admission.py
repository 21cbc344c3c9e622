"""When a call goes to an engine: at once, when there is room, or not at all. The asyncio edge of `HoldQueue`.

There is room at an engine that has nothing to do next or less work than `hold.HORIZON_MS`: so it never runs
dry, and whatever waits longer does so here, where the choice is still open. That holds for the
policy that chooses by cost; the others send at once.

A call may carry an objective for its time to first token. It is refused as soon as that cannot be kept: a
client that is told so early can do better than wait.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from kvfabric_router.api import ApiError
from kvfabric_router.decision import Outcome
from kvfabric_router.dispatch import Call, Plan, Planner, Ranking
from kvfabric_router.fleet import Fleet
from kvfabric_router.hold import (
    MAX_HELD,
    DemandOf,
    Held,
    HoldQueue,
    has_room,
    newcomers_view,
    next_to_go,
    room_in_ms,
)
from kvfabric_router.metrics import RouterMetrics
from kvfabric_router.policy import FleetView, Ranked


class Begun(Protocol):
    """A call that is in the engine's account from the moment of choice on."""

    def abandon(self) -> None:
        """It is not sent after all."""


B = TypeVar("B", bound=Begun)


@dataclass(slots=True, eq=False)
class _Waiting(Generic[B]):
    call: Call
    begun: asyncio.Future[B]
    ranking: Ranking


class Admission(Generic[B]):
    """See the module. Every method is atomic on the event loop but `admit`. `begin` puts a plan into the
    account: the next choice, perhaps in the same turn of the loop, is made by what it then holds.
    """

    def __init__(
        self,
        planner: Planner,
        fleet: Fleet,
        *,
        metrics: RouterMetrics,
        clock: Callable[[], float],
        begin: Callable[[Call, Plan], B],
        max_held: int = MAX_HELD,
    ) -> None:
        self._begin = begin
        self._planner = planner
        self._fleet = fleet
        self._metrics = metrics
        self._clock = clock
        self._queue = HoldQueue[_Waiting[B]](max_held=max_held)
        self._timer: asyncio.TimerHandle | None = None
        self._is_scheduled = False
        fleet.room = self._schedule
        fleet.demand = self._queue.demand

    @property
    def num_held(self) -> int:
        return len(self._queue)

    def outcome(self, call: Call, outcome: Outcome) -> None:
        """What became of an admitted call."""
        self._planner.outcome(call, outcome)

    async def admit(self, call: Call) -> B:
        """What `begin` made of the plan of a call, once an engine has room.

        Raises ApiError 429 (the queue is full) or 503 (its objective cannot be kept), with Retry-After, and
        what `Planner.plan` raises. On cancellation the call waits no more.
        """
        await self._planner.prepare(call)
        if call.tried or not self._planner.holds:
            return self._begin(call, self._planner.plan(self._planner.rank(call)))
        ranking = self._planner.rank(call, newcomers_view(self._queue))
        self._refuse_late(ranking)
        if not self._queue and has_room(ranking.best.candidate.computing.engine):
            return self._begin(call, self._planner.plan(ranking))
        return await self._held(ranking)

    async def _held(self, ranking: Ranking) -> B:
        future: asyncio.Future[B] = asyncio.get_running_loop().create_future()
        held = Held(
            tenant=ranking.call.tenant.tenant_id,
            since=self._clock(),
            item=_Waiting(ranking.call, future, ranking),
            endpoint=ranking.best.candidate.computing.engine.endpoint,
            tokens=ranking.best.candidate.computing.work.computed,
            service_ms=ranking.best.terms.own_work,
        )
        gone = self._queue.add(held)
        if gone is not None:
            gone.item.begun.set_exception(self._full())  # perhaps the newcomer itself
        try:
            self._pump()
            return await future
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().abandon()  # chosen and given up in the same turn of the loop
            raise
        finally:
            self._queue.remove(held)
            self._metrics.held.set(len(self._queue))

    # ------------------------------------------------------------------ who goes

    def _schedule(self) -> None:
        # News comes in bunches: one look after all of them.
        if self._queue and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Let all go that find room where they want to go: one after the other, each seen by the next."""
        self._is_scheduled = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue:
            view = self._fleet.view()
            held = None
            if any(map(has_room, view.engines)):
                held = next_to_go(self._queue, self._clock(), partial(self._rank, view))
            if held is None:
                break
            self._queue.served(held)
            waiting = held.item
            waiting.begun.set_result(self._begin(waiting.call, self._planner.plan(waiting.ranking)))
        self._metrics.held.set(len(self._queue))
        if self._queue:
            # An engine gets room as its work goes on, also without news of it.
            busy = [engine for engine in view.engines if not has_room(engine)]
            later = asyncio.get_running_loop().call_later
            self._timer = later(room_in_ms(busy) / 1e3, self._pump)

    def _rank(self, view: FleetView, held: Held[_Waiting[B]], demand: DemandOf) -> Ranked | None:
        waiting = held.item
        if waiting.begun.done():
            return None  # cancelled or refused: about to leave
        try:
            waiting.ranking = self._planner.rank(waiting.call, demand, view=view)
            self._refuse_late(waiting.ranking)
        except ApiError as exc:
            waiting.begun.set_exception(exc)
            return None
        return waiting.ranking.best

    # ------------------------------------------------------------------ who does not

    def _refuse_late(self, ranking: Ranking) -> None:
        call = ranking.call
        if call.ttft_ms is None:
            return
        waited_ms = (self._clock() - call.arrived) * 1e3
        expected_ms = waited_ms + ranking.best.terms.first_token
        if expected_ms <= call.ttft_ms:
            return
        self._metrics.refused.labels(reason="objective").inc()
        raise ApiError(
            503,
            f"The first token would take {expected_ms:.0f} ms, more than the {call.ttft_ms:.0f} ms "
            "that were asked for.",
            code="objective_unreachable",
            retry_after_s=math.ceil(max(expected_ms - call.ttft_ms, 1_000.0) / 1e3),
        )

    def _full(self) -> ApiError:
        self._metrics.refused.labels(reason="full").inc()
        drained_s = self._queue.service_ms / 1e3 / max(len(self._fleet.view().engines), 1)
        return ApiError(
            429,
            "More requests wait than the router holds.",
            code="overloaded",
            retry_after_s=max(math.ceil(drained_s), 1),
        )
