"""The engines this router knows: what they are, whether they answer, what they are doing for us. Sync state.

Two sources, each for what it knows. A node says which engine sessions it serves and where; the engine's own
`/v1/models` says that it lives and what it can. An engine takes requests once it answered a probe, whatever
became of its node: without a session it gets no handle, and that is all.

    UNPROBED --probe--> TAKING --failed request, failed probes, session gone--> EXCLUDED
                          ^                                                        |
                          +-------------------- probe answered --------------------+
    EXCLUDED for `FORGET_S`, and named by neither node nor configuration --> forgotten
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvfabric.types import NodeId
from kvfabric_router.diagnosis import EngineSight
from kvfabric_router.flight import Activity, Flight, Sent
from kvfabric_router.hold import Demand
from kvfabric_router.identity import ModelIdentity
from kvfabric_router.policy import EngineView, FleetView
from kvfabric_router.predicted import Predicted
from kvfabric_router.rates import UNKNOWN, UNMEASURED, NodeRates, Rates, fetch_prior, typical
from kvfabric_router.shared_load import EngineLoad, SharedLoad
from kvfabric_router.tokenizers import UNKNOWN as UNKNOWN_TOKENIZER
from kvfabric_router.tokenizers import TokenCounts, Tokenizers
from kvfabric_router.topology import Topology

PROBE_EVERY_S = 2.0
BACKOFF_S, MAX_BACKOFF_S = 0.25, PROBE_EVERY_S
PROBE_FAILURES = 2
"""Probes in a row that an engine may miss while it takes requests: a busy one may be late once."""
FORGET_S = 60.0
_SEVERAL = 3  # engines of which one of itself is not the median
_LEAN_S = 0.1  # between two looks at what the others of a fleet are like


@dataclass(frozen=True, slots=True)
class SessionReport:
    """An engine session as a node announces it."""

    endpoint: str
    engine_id: str
    session: bytes
    model_name: str
    model: ModelIdentity
    block_bytes: int
    serves: str = "both"


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
    activity: Activity
    configured: bool = False
    node_id: NodeId | None = None
    announced: SessionReport | None = None
    probed: ProbeReport | None = None
    excluded: bool = False
    failures: int = 0
    next_probe: float = 0.0
    failing_since: float = 0.0
    counts: TokenCounts = field(default_factory=TokenCounts)

    @property
    def takes_requests(self) -> bool:
        return self.probed is not None and not self.excluded

    @property
    def model_names(self) -> set[str]:
        report = self.probed or self.announced
        return {report.model_name} if report is not None else set()

    def tokenizer(self, tokenizers: Tokenizers) -> str:
        """Name of the one that makes the tokens that it makes, as far as is known."""
        assert self.probed is not None, "only probed engines are shown"
        if self.counts.differ:
            return UNKNOWN_TOKENIZER
        return tokenizers.name_for(self.probed.model_name, self.probed.tokenizer)

    def seen(self) -> EngineView:
        """What it says of itself, without what it does."""
        assert self.probed is not None, "only probed engines are shown"
        return EngineView(
            endpoint=self.endpoint,
            engine_id=self.announced.engine_id if self.announced else self.endpoint,
            model_name=self.probed.model_name,
            model=self.probed.model,
            tokenizer=self.probed.tokenizer,
        )

    def differences(self) -> tuple[str, ...]:
        """What the node's word of it and its own differ in."""
        node, own = self.announced, self.probed
        if node is None or own is None or own.model is None:
            return ()
        names = ("block_tokens", "layout_fingerprint", "model_revision", "adapter")
        found = [n for n in names if getattr(node.model, n) != getattr(own.model, n)]
        return (*found, *(["session"] if own.session != node.session else []))

    @property
    def token_bytes(self) -> float:
        """KV of a token; 0 while no node tells."""
        announced = self.announced
        return announced.block_bytes / announced.model.block_tokens if announced else 0.0

    def lean_on(self, others: Rates, measured: NodeRates) -> None:
        """Not seen at work yet, it counts as one of the others, not as a faster one, but for what its node
        `measured`."""
        prior = fetch_prior(self.token_bytes, others, measured)
        self.activity.learner.prior(prior, is_fleets=others is not UNKNOWN, measured=measured)

    def view(self, tokenizers: Tokenizers) -> EngineView:
        announced, probed, activity = self.announced, self.probed, self.activity
        assert probed is not None, "only probed engines are shown"
        waiting = activity.waiting()
        return EngineView(
            endpoint=self.endpoint,
            engine_id=announced.engine_id if announced else self.endpoint,
            model_name=probed.model_name,  # as clients know it; a node has it from its weights
            node_id=self.node_id if announced else None,
            session=announced.session if announced else probed.session,
            model=announced.model if announced else probed.model,
            block_bytes=announced.block_bytes if announced else 0,
            tokenizer=self.tokenizer(tokenizers),
            max_model_tokens=probed.max_model_tokens,
            rates=activity.learner.rates,
            waiting_ms=activity.waiting_ms(waiting),
            num_waiting=len(waiting),
            num_decoding=len(activity.flights) - len(waiting),
            serves=announced.serves if announced else "both",
        )


def base_url(endpoint: str) -> str:
    """`host:port` or a URL -> URL without a slash at its end: one name for one engine."""
    endpoint = endpoint.rstrip("/")
    return endpoint if "://" in endpoint else f"http://{endpoint}"


class Fleet:
    """See the module. `clock`: monotonic seconds. Every method is atomic on the event loop."""

    def __init__(self, *, clock: Callable[[], float], tokenizers: Tokenizers | None = None) -> None:
        self._clock = clock
        self._tokenizers = tokenizers or Tokenizers()
        self._engines: dict[str, _Engine] = {}
        self._named: dict[NodeId, frozenset[str]] = {}
        self._leaning: tuple[object, ...] = ()
        self._leaning_until = 0.0
        self.predicted = Predicted(clock=clock)
        self.topology = Topology()
        self.shared = SharedLoad(clock)
        self.distrusted: dict[NodeId, asyncio.Event] = {}
        """Set when what a node told is wrong about an engine of it, again and again: learn it anew."""
        self.room: Callable[[], None] = lambda: None
        """Called when an engine may have room for another request."""
        self.demand: Callable[[str], Demand] = lambda _endpoint: Demand()
        """Who waits at this router for an engine."""
        self.probe_due = asyncio.Event()
        """Set when an engine should be probed earlier than planned."""

    def __repr__(self) -> str:
        taking = sum(engine.takes_requests for engine in self._engines.values())
        flights = sum(len(engine.activity.flights) for engine in self._engines.values())
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
        named: dict[str, SessionReport] = {}
        for report in reports:
            known = self._engines.get(base_url(report.endpoint))
            # Of two sessions at one endpoint the earlier has not been seen to end yet.
            own = known.probed.session if known is not None and known.probed is not None else b""
            if base_url(report.endpoint) not in named or report.session == own:
                named[base_url(report.endpoint)] = report
        self._named[node_id] = frozenset(named)
        for engine in self._engines.values():
            if engine.node_id == node_id and engine.endpoint not in named:
                self._session_gone(engine)
        for endpoint, report in named.items():
            engine = self._known(endpoint)
            if engine.announced != report:
                engine.counts = TokenCounts()
                engine.node_id, engine.announced = node_id, report
                self._probe_soon(engine)

    def node_lost(self, node_id: NodeId) -> None:
        """No news from a node: its sessions end, its engines serve on by themselves."""
        self._named.pop(node_id, None)
        self.topology.lost(node_id)
        for engine in self._engines.values():
            if engine.node_id == node_id:
                engine.announced = None

    def _known(self, endpoint: str) -> _Engine:
        endpoint = base_url(endpoint)
        if endpoint not in self._engines:
            activity = Activity(endpoint, self.predicted, self._clock, self._has_room)
            self._engines[endpoint] = _Engine(endpoint, activity, failing_since=self._clock())
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
            if engine.probed is not None and engine.probed.session != report.session:
                self.predicted.forget(endpoint)
                engine.counts = TokenCounts()
            engine.probed = report
            engine.excluded = False
            engine.failures = 0
            self.room()

    def session_moved(self, endpoint: str, report: ProbeReport) -> None:
        """The engine has started anew, which its node has not told yet: believe the engine."""
        engine = self._engines.get(endpoint)
        if engine is not None:
            engine.announced = None
            engine.probed = report
            self.predicted.forget(endpoint)

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
        for flight in engine.activity.flights.values():
            flight.give_up()

    def _exclude(self, engine: _Engine) -> None:
        now = self._clock()
        if not engine.excluded:
            engine.failing_since = now
            self.predicted.forget(engine.endpoint)  # most often it ended
        engine.excluded = True
        engine.next_probe = now + min(BACKOFF_S * 2 ** min(engine.failures, 8), MAX_BACKOFF_S)
        self.probe_due.set()  # the prober plans its next round anew

    def _probe_soon(self, engine: _Engine) -> None:
        engine.next_probe = self._clock()
        self.probe_due.set()

    # ------------------------------------------------------------------ what they do

    def view(self) -> FleetView:
        """The engines that take requests now."""
        taking = [engine for engine in self._engines.values() if engine.takes_requests]
        self._lean(taking)
        seen = self.shared.seen
        return FleetView(tuple([seen(engine.view(self._tokenizers)) for engine in taking]))

    def loads(self) -> list[EngineLoad]:
        """What this router has at each engine, and what waits here for it."""
        found = []
        for engine in self._engines.values():
            activity, held = engine.activity, self.demand(engine.endpoint)
            waiting = activity.waiting()
            found.append(
                EngineLoad(
                    endpoint=engine.endpoint,
                    waiting_ms=activity.waiting_ms(waiting),
                    num_waiting=len(waiting),
                    num_decoding=len(activity.flights) - len(waiting),
                    held_ms=held.ms,
                    num_held=held.num,
                )
            )
        return found

    def _lean(self, taking: list[_Engine]) -> None:
        """What is known of all engines, for those of which less is. Now and then: it changes slowly."""
        on = tuple([(e.announced, not e.activity.learner.num_sights) for e in taking])
        now = self._clock()
        if now < self._leaning_until and on == self._leaning:
            return
        self._leaning, self._leaning_until = on, now + _LEAN_S
        learners = [engine.activity.learner for engine in taking]
        seen = [learner.rates for learner in learners if learner.num_sights]
        others = typical(seen) if seen else UNKNOWN
        for engine in taking:
            measured = self.topology.rates_of(engine.node_id)
            if len(seen) >= _SEVERAL or not engine.activity.learner.num_sights:
                engine.lean_on(others, measured)
            elif measured is not UNMEASURED:
                engine.activity.learner.node_measured(engine.token_bytes, measured)

    def flight(self, endpoint: str, sent: Sent) -> Flight:
        """A request about to be sent; enter it before sending."""
        engine = self._engines[endpoint]
        return Flight(
            engine.activity,
            sent,
            is_told=engine.announced is not None and sent.is_exact,
            wrong=(lambda: self._distrust(engine)) if sent.is_exact else lambda: None,
        )

    def counted(self, endpoint: str, *, ours: int, its: int) -> None:
        """Tokens of one prompt, by the router's tokenizer and by the engine itself."""
        engine = self._engines.get(endpoint)
        # One that names its tokenizer is believed: the name says what its tokens are.
        if engine is None or engine.probed is None or engine.probed.tokenizer:
            return
        if ours == its:
            engine.counts.num_equal += 1
        else:
            engine.counts.num_different += 1

    def _has_room(self) -> None:
        self.room()

    def _distrust(self, engine: _Engine) -> None:
        if engine.node_id is not None and engine.announced is not None:
            self.distrusted.setdefault(engine.node_id, asyncio.Event()).set()

    @property
    def num_flights(self) -> int:
        return sum(len(engine.activity.flights) for engine in self._engines.values())

    def counts(self) -> dict[str, int]:
        """Engines by what is to be done with them."""
        taking = sum(engine.takes_requests for engine in self._engines.values())
        return {"taking": taking, "excluded": len(self._engines) - taking}

    def sights(self) -> list[EngineSight]:
        """Every engine that was probed, with what its node says otherwise and which nodes name it."""
        found = []
        for engine in self._engines.values():
            if engine.probed is not None:
                nodes = sorted(n for n, named in self._named.items() if engine.endpoint in named)
                found.append(
                    EngineSight(
                        engine.seen(),
                        engine.differences(),
                        tuple(nodes),
                        ours=self._tokenizers.name_for(
                            engine.probed.model_name, engine.probed.tokenizer
                        ),
                        expected=self._tokenizers.of_model(engine.probed.model_name),
                        counts=engine.counts,
                    )
                )
        return found

    def not_taking(self, name: str) -> tuple[tuple[str, str], ...]:
        """(endpoint, why) of those of a model's engines that take no requests now."""
        return tuple(
            (engine.endpoint, "excluded: it failed" if engine.excluded else "not probed yet")
            for engine in self._engines.values()
            if not engine.takes_requests and name in engine.model_names
        )

    def knows_model(self, name: str) -> bool:
        """Whether an engine serves it or, not having said yet what it serves, may do so."""
        names = [engine.model_names for engine in self._engines.values()]
        return any(name in some or not some for some in names)
