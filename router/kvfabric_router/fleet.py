"""The engines this router knows: what they are, whether they answer, what they are doing for us. Sync state.

Two sources, each for what it knows. A node says which engine sessions it serves and where; the engine's own
`/v1/models` says that it lives and what it can. An engine takes requests once it answered a probe, whatever
became of its node: without a session it gets no handle, and that is all.

    UNPROBED --probe--> TAKING --failed request, failed probes, session gone--> EXCLUDED
                          ^                                                        |
                          +-------------------- probe answered --------------------+
    EXCLUDED for `FORGET_S`, and named by neither node nor configuration --> forgotten

What an engine is doing is the set of its `Flight`s. A flight ends with its `with` block, so a client
that goes away, a cancelled task and a failed engine all leave the account right.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from statistics import median
from types import TracebackType
from typing import Self

from kvfabric.types import NodeId
from kvfabric_router.identity import ModelIdentity
from kvfabric_router.policy import EngineView, FleetView, Rates

BACKOFF_S, MAX_BACKOFF_S = 0.25, 10.0
PROBE_EVERY_S = 2.0
PROBE_FAILURES = 2
"""Probes in a row that an engine may miss while it takes requests: a busy one may be late once."""
FORGET_S = 60.0
_LEARN = 0.2  # weight of a new measurement
_LEAST_TOKENS = 16  # fewer computed tokens than this say more of overhead than of the rate


@dataclass(frozen=True, slots=True)
class SessionReport:
    """An engine session as a node announces it."""

    endpoint: str
    engine_id: str
    session: bytes
    model_name: str
    model: ModelIdentity
    block_bytes: int


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What an engine says of itself. `model` is None if it does not say what its KV depends on."""

    model_name: str
    session: bytes = b""
    model: ModelIdentity | None = None
    tokenizer: str = ""
    max_model_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Engine:
    endpoint: str
    configured: bool = False
    node_id: NodeId | None = None
    announced: SessionReport | None = None
    probed: ProbeReport | None = None
    excluded: bool = False
    failures: int = 0
    next_probe: float = 0.0
    failing_since: float = 0.0
    rates: Rates = field(default_factory=Rates)
    measured: bool = False
    flights: dict[int, Flight] = field(default_factory=dict)
    last_first_byte: float = 0.0

    @property
    def takes_requests(self) -> bool:
        return self.probed is not None and not self.excluded

    @property
    def model_names(self) -> set[str]:
        return {report.model_name for report in (self.announced, self.probed) if report is not None}

    def view(self, now: float, rates: Rates) -> EngineView:
        announced, probed = self.announced, self.probed
        assert probed is not None, "only probed engines are shown"
        waiting = [flight for flight in self.flights.values() if flight.first_byte_at is None]
        return EngineView(
            endpoint=self.endpoint,
            engine_id=announced.engine_id if announced else self.endpoint,
            model_name=announced.model_name if announced else probed.model_name,
            node_id=self.node_id if announced else None,
            session=announced.session if announced else probed.session,
            model=announced.model if announced else probed.model,
            block_bytes=announced.block_bytes if announced else 0,
            tokenizer=probed.tokenizer,
            max_model_tokens=probed.max_model_tokens,
            rates=rates,
            waiting_ms=self._waiting_ms(waiting, now),
            num_waiting=len(waiting),
            num_decoding=len(self.flights) - len(waiting),
        )

    def _waiting_ms(self, waiting: list[Flight], now: float) -> float:
        if not waiting:
            return 0.0
        # First come, first served: the engine has been at the oldest since it got it, or since it
        # finished the one before.
        head = waiting[0]
        done = min((now - max(head.sent_at, self.last_first_byte)) * 1e3, head.work_ms)
        return max(sum(flight.work_ms for flight in waiting) - max(done, 0.0), 0.0)


class Flight:
    """One request at one engine, from before it is sent until its `with` block ends.

    `work_ms`: predicted work before its first byte; `computed_tokens`: prompt tokens it has to compute.
    """

    def __init__(
        self, engine: _Engine, *, work_ms: float, computed_tokens: int, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._clock = clock
        self.work_ms = work_ms
        self.computed_tokens = computed_tokens
        self.sent_at = clock()
        self.first_byte_at: float | None = None
        self._lost = False
        self._limit: asyncio.Timeout | None = None
        self._events = 0
        self._last_event_at = 0.0

    def __enter__(self) -> Self:
        self.sent_at = self._clock()
        self._engine.flights[id(self)] = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._engine.flights.pop(id(self), None)
        if (
            self.first_byte_at is None
        ):  # not streamed, or failed: the engine is done with it all the same
            self._engine.last_first_byte = self._clock()
        if self._events > 1 and self.first_byte_at is not None:
            steps_ms = (self._last_event_at - self.first_byte_at) * 1e3 / (self._events - 1)
            rates = self._engine.rates
            self._engine.rates = replace(rates, decode_ms=_learn(rates.decode_ms, steps_ms))

    @contextlib.asynccontextmanager
    async def unless_lost(self) -> AsyncIterator[None]:
        """Around a wait for this engine. Raises TimeoutError once the engine is given up."""
        async with asyncio.timeout(0 if self._lost else None) as self._limit:
            try:
                yield
            finally:
                self._limit = None

    def give_up(self) -> None:
        """The engine stopped answering probes: nobody need wait for it."""
        if not self._lost and self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time())
        self._lost = True

    def stream_event(self) -> None:
        """A piece of a streamed answer arrived; the first teaches how fast the engine computes."""
        now = self._clock()
        self._events += 1
        self._last_event_at = now
        if self.first_byte_at is None:
            self.first_byte_at = now
            self._teach_prefill(now)
            self._engine.last_first_byte = now

    def _teach_prefill(self, now: float) -> None:
        if self.computed_tokens < _LEAST_TOKENS:
            return
        engine = self._engine
        began = max(self.sent_at, engine.last_first_byte)
        measured = (now - began) * 1e3 / self.computed_tokens
        known = engine.rates.prefill_ms_per_token
        taught = _learn(known, measured) if engine.measured else measured
        engine.rates = replace(engine.rates, prefill_ms_per_token=max(taught, 1e-6))
        engine.measured = True


def _learn(known: float, measured: float) -> float:
    return known + _LEARN * (measured - known)


def base_url(endpoint: str) -> str:
    """`host:port` or a URL -> URL without a slash at its end: one name for one engine."""
    endpoint = endpoint.rstrip("/")
    return endpoint if "://" in endpoint else f"http://{endpoint}"


class Fleet:
    """See the module. `clock`: monotonic seconds. Every method is atomic on the event loop."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._engines: dict[str, _Engine] = {}
        self.probe_due = asyncio.Event()
        """Set when an engine should be probed earlier than planned."""

    def __repr__(self) -> str:
        taking = sum(engine.takes_requests for engine in self._engines.values())
        flights = sum(len(engine.flights) for engine in self._engines.values())
        return (
            f"<Fleet [Engines: {taking} taking, {len(self._engines)} known | Flights: {flights}]>"
        )

    # ------------------------------------------------------------------ what engines there are

    def configure(self, endpoints: Iterable[str]) -> None:
        """Engines that the configuration names: never forgotten."""
        for endpoint in endpoints:
            self._known(endpoint).configured = True

    def announce(self, node_id: NodeId, reports: Iterable[SessionReport]) -> None:
        """All sessions that a node serves now; those it served before and does not name are gone."""
        named = {base_url(report.endpoint): report for report in reports}
        for engine in self._engines.values():
            if engine.node_id == node_id and engine.endpoint not in named:
                self._session_gone(engine)
        for endpoint, report in named.items():
            engine = self._known(endpoint)
            if engine.announced != report:
                engine.node_id, engine.announced = node_id, report
                self._probe_soon(engine)

    def node_lost(self, node_id: NodeId) -> None:
        """No news from a node: its sessions end, its engines serve on by themselves."""
        for engine in self._engines.values():
            if engine.node_id == node_id:
                engine.announced = None

    def _known(self, endpoint: str) -> _Engine:
        endpoint = base_url(endpoint)
        if endpoint not in self._engines:
            self._engines[endpoint] = _Engine(endpoint, failing_since=self._clock())
            self._probe_soon(self._engines[endpoint])
        return self._engines[endpoint]

    def _session_gone(self, engine: _Engine) -> None:
        # Most often the process ended: ask before sending anything more.
        if engine.announced is not None:
            engine.announced = None
            self._exclude(engine)
            self._probe_soon(engine)

    # ------------------------------------------------------------------ whether they answer

    def due(self) -> tuple[str, ...]:
        """Endpoints to probe now; each is due again later, whatever becomes of the probe."""
        now = self._clock()
        found = []
        for engine in list(self._engines.values()):
            unwanted = engine.announced is None and not engine.configured
            failing = engine.excluded or engine.probed is None
            if unwanted and failing and now - engine.failing_since > FORGET_S:
                del self._engines[engine.endpoint]
            elif engine.next_probe <= now:
                engine.next_probe = now + PROBE_EVERY_S
                found.append(engine.endpoint)
        return tuple(found)

    def next_probe_in(self) -> float:
        """Seconds until `due` may have something."""
        now = self._clock()
        return max(min((e.next_probe for e in self._engines.values()), default=now + 1) - now, 0.0)

    def probe_answered(self, endpoint: str, report: ProbeReport) -> None:
        engine = self._engines.get(endpoint)
        if engine is not None:
            engine.probed = report
            engine.excluded = False
            engine.failures = 0

    def probe_failed(self, endpoint: str) -> None:
        engine = self._engines.get(endpoint)
        if engine is None:
            return
        engine.failures += 1
        if engine.excluded or engine.failures >= PROBE_FAILURES:
            self._give_up(engine)
        else:
            engine.next_probe = self._clock() + BACKOFF_S

    def failed(self, endpoint: str) -> None:
        """A request found the engine broken: no more of them until a probe is answered.

        Those that wait there go on waiting: if the engine is gone, their connections break too.
        """
        engine = self._engines.get(endpoint)
        if engine is not None:
            engine.failures += 1
            self._exclude(engine)

    def _give_up(self, engine: _Engine) -> None:
        self._exclude(engine)
        for flight in engine.flights.values():
            flight.give_up()

    def _exclude(self, engine: _Engine) -> None:
        now = self._clock()
        if not engine.excluded:
            engine.failing_since = now
        engine.excluded = True
        engine.next_probe = now + min(BACKOFF_S * 2 ** min(engine.failures, 8), MAX_BACKOFF_S)
        self.probe_due.set()  # the prober plans its next round anew

    def _probe_soon(self, engine: _Engine) -> None:
        engine.next_probe = self._clock()
        self.probe_due.set()

    # ------------------------------------------------------------------ what they do

    def view(self) -> FleetView:
        """The engines that take requests now."""
        now = self._clock()
        taking = [engine for engine in self._engines.values() if engine.takes_requests]
        measured = [engine.rates for engine in taking if engine.measured]
        # An engine that was not seen at work yet counts as one of the others, not as a faster one.
        typical = (
            Rates(
                median(rates.prefill_ms_per_token for rates in measured),
                median(rates.decode_ms for rates in measured),
            )
            if measured
            else Rates()
        )
        return FleetView(tuple(e.view(now, e.rates if e.measured else typical) for e in taking))

    def flight(self, endpoint: str, *, work_ms: float, computed_tokens: int) -> Flight:
        """A request about to be sent; enter it before sending."""
        return Flight(
            self._engines[endpoint],
            work_ms=work_ms,
            computed_tokens=computed_tokens,
            clock=self._clock,
        )

    @property
    def num_flights(self) -> int:
        return sum(len(engine.flights) for engine in self._engines.values())

    def counts(self) -> dict[str, int]:
        """Engines by what is to be done with them."""
        taking = sum(engine.takes_requests for engine in self._engines.values())
        return {"taking": taking, "excluded": len(self._engines) - taking}

    def knows_model(self, name: str) -> bool:
        """Whether an engine serves it or, not having said yet what it serves, may do so."""
        names = [engine.model_names for engine in self._engines.values()]
        return any(name in some or not some for some in names)
