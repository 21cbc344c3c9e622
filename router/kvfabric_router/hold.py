"""`HoldQueue`: requests that wait at the router because the engines have enough to do. Sync state, no I/O.

An engine gets the next request shortly before it is through with the last: until then the choice stays open,
and who waits longest in proportion to the root of its work goes first: between first come, first served and
highest response ratio next (Brinch Hansen 1971), whose long requests are the last twentieth under overload.
Short requests do not wait behind long ones, and nobody waits for ever.

Between tenants deficit round robin (Shreedhar and Varghese 1995) decides, charged by uncached tokens: who
asks much waits behind its own requests. What a tenant used beyond its turn is remembered until nobody waits.

The queue is bounded. When it is full, a newcomer of the tenant that holds most is refused; for one of another
tenant the newest of that tenant's goes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from msgspec.structs import replace

from kvfabric_router.policy import EngineView, Ranked

HORIZON_MS = 100.0
LOOKED_AT = 64
"""Of each tenant, when an engine has room: those further back wait for their turn, whatever they want. Among
8, all may want engines that have none, while another runs dry."""
MAX_HELD = 2048
_SURE_MS = 1.0  # past the moment, not before it
_LOOK_MS = 100.0
QUANTUM_TOKENS = 8192

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Held(Generic[T]):
    """One request that waits, for the engine `endpoint`: its work there in uncached tokens and in time."""

    tenant: str
    since: float
    item: T
    endpoint: str = ""
    tokens: int = 0
    service_ms: float = 0.0

    def ratio(self, now: float) -> float:
        """How long it takes altogether over the root of how long its work takes."""
        service_s = max(self.service_ms, 1.0) / 1e3
        return (now - self.since + service_s) / math.sqrt(service_s)


@dataclass(slots=True)
class Demand:
    """Requests that wait for one engine, and their work there."""

    num: int = 0
    ms: float = 0.0


_NOBODY = Demand()


class HoldQueue(Generic[T]):
    """See the module. Times are monotonic seconds, the caller's."""

    def __init__(self, *, max_held: int = MAX_HELD) -> None:
        self._max_held = max_held
        self._tenants: dict[str, dict[int, Held[T]]] = {}
        self._deficits: dict[str, float] = {}
        self._demand: dict[str, Demand] = {}

    def __len__(self) -> int:
        return sum(len(held) for held in self._tenants.values())

    def __repr__(self) -> str:
        return f"<HoldQueue {len(self)} of {len(self._tenants)} tenants>"

    @property
    def service_ms(self) -> float:
        """Work of all that wait."""
        return sum(demand.ms for demand in self._demand.values())

    def demand(self, endpoint: str) -> Demand:
        """Who waits for this engine; read only."""
        return self._demand.get(endpoint, _NOBODY)

    def turn_to(self, held: Held[T], endpoint: str, *, tokens: int, service_ms: float) -> None:
        """It waits for another engine now, or its work there has changed."""
        self._count(held, -1)
        held.endpoint, held.tokens, held.service_ms = endpoint, tokens, service_ms
        self._count(held, +1)

    def _count(self, held: Held[T], sign: int) -> None:
        known = self._demand.setdefault(held.endpoint, Demand())
        known.num += sign
        known.ms = max(known.ms + sign * held.service_ms, 0.0) if known.num else 0.0

    def add(self, held: Held[T]) -> Held[T] | None:
        """Take one in. Returns who has to go for it: None, another, or `held` itself, not taken in."""
        gone = None
        if len(self) >= self._max_held:
            most = max(self._tenants, key=lambda tenant: len(self._tenants[tenant]))
            mine = len(self._tenants.get(held.tenant, ()))
            if mine + 1 >= len(self._tenants[most]):
                return held
            gone = max(self._tenants[most].values(), key=lambda one: one.since)
            self.remove(gone)
        self._tenants.setdefault(held.tenant, {})[id(held)] = held
        self._count(held, +1)
        self._deficits.setdefault(held.tenant, 0.0)
        return gone

    def remove(self, held: Held[T]) -> None:
        """It waits no more, for whatever reason. Idempotent."""
        mine = self._tenants.get(held.tenant)
        if mine is None or mine.pop(id(held), None) is None:
            return
        self._count(held, -1)
        if not mine:
            del self._tenants[held.tenant]
            self._deficits[held.tenant] = min(self._deficits[held.tenant], 0.0)
        if not self._tenants:
            self._deficits.clear()
            self._demand.clear()

    def served(self, held: Held[T]) -> None:
        """It goes to an engine: its tenant is charged."""
        self._deficits[held.tenant] -= held.tokens
        self.remove(held)

    def in_turn(self, now: float, *, limit: int) -> Iterator[Held[T]]:
        """Who goes next, best first: at most `limit` of each tenant, in the order of their turns."""
        self._refill()
        for tenant in sorted(self._tenants, key=lambda t: -self._deficits[t]):
            mine = self._tenants[tenant].values()
            yield from heapq.nlargest(limit, mine, key=lambda one: one.ratio(now))

    def _refill(self) -> None:
        """A new round for those that wait, once all of them have used theirs up."""
        if not self._tenants:
            return
        most = max(self._deficits[tenant] for tenant in self._tenants)
        rounds = max(-(most // QUANTUM_TOKENS), 0.0)
        if most <= 0:
            for tenant in self._tenants:
                self._deficits[tenant] = min(
                    self._deficits[tenant] + max(rounds, 1.0) * QUANTUM_TOKENS, QUANTUM_TOKENS
                )


DemandOf = Callable[[EngineView], EngineView]
"""An engine, with who waits for it at the router."""


def has_room(engine: EngineView) -> bool:
    """Whether it should get another request now: before it runs dry, and hardly earlier.

    One that is computed and one that is next, whatever was predicted of them: a prediction that is too long
    must not leave an engine idle, which would confirm it.
    """
    return engine.num_waiting < 2 or engine.waiting_ms < HORIZON_MS


def room_in_ms(engines: Sequence[EngineView]) -> float:
    """When the first of them will have room, if none sends news before; 0: one has."""
    return min((_room_in_ms(engine) for engine in engines), default=HORIZON_MS)


def _room_in_ms(engine: EngineView) -> float:
    if has_room(engine):
        return 0.0
    left = max(engine.waiting_ms - HORIZON_MS + _SURE_MS, 0.0)
    # What others have there is not seen to shrink: look again, but not all the time.
    return max(left, _LOOK_MS) if engine.background_ms else left


def _with_held(engine: EngineView, num: int, ms: float) -> EngineView:
    """With those that wait for it here, beside those that are known to wait at other replicas."""
    return replace(engine, num_held=engine.num_held + num, held_ms=engine.held_ms + ms)


def newcomers_view(queue: HoldQueue[T]) -> DemandOf:
    """Engines as who is not in the queue yet sees them: behind all that wait."""

    def seen(engine: EngineView) -> EngineView:
        demand = queue.demand(engine.endpoint)
        if not demand.num:
            return engine
        return _with_held(engine, demand.num, demand.ms)

    return seen


def next_to_go(
    queue: HoldQueue[T], now: float, rank: Callable[[Held[T], DemandOf], Ranked | None]
) -> Held[T] | None:
    """The first in turn that would go to an engine with room, still in the queue; None if nobody would.

    `rank`: where one would go, given who waits; None if it cannot be told any more. Who passes is behind
    those that wait for the same engine and come before it: so a crowd that wants one engine spreads.
    """
    ahead: dict[str, float] = {}
    for held in list(queue.in_turn(now, limit=LOOKED_AT)):

        def seen(engine: EngineView, mine: str = held.endpoint) -> EngineView:
            num = queue.demand(engine.endpoint).num - (engine.endpoint == mine)
            return _with_held(engine, num, ahead.get(engine.endpoint, 0.0))

        best = rank(held, seen)
        if best is None:
            continue
        engine = best.candidate.computing.engine
        work = best.candidate.computing.work.computed
        queue.turn_to(held, engine.endpoint, tokens=work, service_ms=best.terms.own_work)
        if has_room(engine):
            return held
        ahead[engine.endpoint] = ahead.get(engine.endpoint, 0.0) + held.service_ms
    return None
