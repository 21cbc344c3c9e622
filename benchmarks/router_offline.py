"""The benchmark of the router in virtual time: production policy and accounting, no processes, seconds a row.

    python benchmarks/router_offline.py [--trace conversation] [--load 1.0] [--policies cost round_robin ...]

Engines, requests and figures are those of `bench_router.py`; fleet, flights, learned rates, expected blocks,
ranking and the queue of those that wait are the router's own, on the virtual clock. Left out: HTTP, tokens
and keys (a block is its number), the node (an engine's news takes `NEWS_S`). For tuning and for what-ifs;
what is quoted comes from `bench_router.py`.

`--rate-error X` multiplies each engine's learned rates by a factor of its own, log-normal with that sigma.
`--host-blocks N` puts a host tier of N blocks behind each engine, loaded at `HOST_TOKENS_PER_S`.
`--send-at-once` lets no request wait at the router.
`--replicas N` spreads the requests at random over N routers, which tell each other their load twice a second
with `--share-s S`, S seconds late. `--compression 1` leaves the engines at their real speed beside that.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import statistics
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from msgspec.structs import replace

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "router")]

import harness  # noqa: E402
import traffic  # noqa: E402
from kvfabric_router import policy  # noqa: E402
from kvfabric_router.fleet import Fleet, ProbeReport, SessionReport  # noqa: E402
from kvfabric_router.flight import Flight, Sent  # noqa: E402
from kvfabric_router.hold import (  # noqa: E402
    DemandOf,
    Held,
    HoldQueue,
    has_room,
    newcomers_view,
    next_to_go,
    room_in_ms,
)
from kvfabric_router.identity import ModelIdentity  # noqa: E402
from kvfabric_router.policy import Candidate, EngineView, Ranked  # noqa: E402
from kvfabric_router.rates import Rates, Work  # noqa: E402
from kvfabric_router.shared_load import PUBLISH_S, LoadReport  # noqa: E402
from simulated import EngineModel, PrefixCache  # noqa: E402

from kvfabric.events.index import Holder, Present  # noqa: E402
from kvfabric.types import BlockKey, NodeId, TierName  # noqa: E402

NUM_ENGINES = 8
COMPRESSION = 8.0
NEWS_S = 0.04
"""Wall seconds from an engine's change to the router's index: two batches of the event stream."""
HOST_TOKENS_PER_S = 100_000.0
_MODEL = ModelIdentity("simulated", bytes(32), traffic.ENGINE_BLOCK_TOKENS)

POLICIES = ("cost", "least_loaded", "round_robin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """See the module. `share_s`: None if the replicas tell each other nothing."""

    holds: bool = True
    host_blocks: int = 0
    rate_error: float = 0.0
    compression: float = COMPRESSION
    replicas: int = 1
    share_s: float | None = None


@dataclass(slots=True)
class _Ask:
    request: traffic.Request
    blocks: Sequence[int]
    usable: Sequence[int]
    keys: Sequence[BlockKey]
    arrived_s: float
    flight: Flight | None = None
    router: _Router | None = None
    cached: Work = field(default_factory=lambda: Work(0))
    ttft_s: float = 0.0


@dataclass(slots=True)
class _Engine:
    """What `simulated.SimulatedEngine` is, on the virtual clock; `told` is what the index knows of it."""

    endpoint: str
    session: bytes
    hbm: PrefixCache
    host: PrefixCache | None
    rate_factor: float
    queue: deque[_Ask] = field(default_factory=deque)
    told: dict[TierName, set[Hashable]] = field(default_factory=lambda: defaultdict(set))
    num_decoding: int = 0
    computed_tokens: int = 0


class _Router:
    """One replica: fleet, queue and choice are the router's own."""

    def __init__(
        self, simulation: Simulation, policy_name: str, *, holds: bool, rng: Random
    ) -> None:
        self._simulation = simulation
        self._policy = policy_name
        self._turns = itertools.count()
        self._holds = holds and policy_name == "cost"
        self._queue = HoldQueue[_Ask]()
        self._timer = 0
        self._rng = rng
        self.fleet = Fleet(clock=lambda: simulation.now)
        self.fleet.demand = self._queue.demand
        for number, name in enumerate(simulation.engines):
            report = SessionReport(name, name, bytes([number]) * 16, "m", _MODEL, 4096)
            self.fleet.announce(NodeId(name), [report])
            self.fleet.probe_answered(name, ProbeReport("m", tokenizer="byte"))

    def arrive(self, ask: _Ask) -> None:
        if not self._holds:
            self._send(ask, self._rank(ask)[0])
            return
        best = self._rank(ask, newcomers_view(self._queue))[0]
        if not self._queue and has_room(best.candidate.engine):
            self._send(ask, best)
            return
        held = Held(tenant="", since=self._simulation.now, item=ask)
        self._queue.add(held)
        engine, work = best.candidate.engine, best.candidate.work
        self._queue.turn_to(
            held, engine.endpoint, tokens=work.computed, service_ms=best.terms.own_work
        )
        self.pump()

    def pump(self) -> None:
        """As `Admission`, with no time between one that goes and the next."""
        while self._queue and any(map(has_room, self.fleet.view().engines)):
            best: dict[int, Ranked] = {}

            def rank(held: Held[_Ask], demand: DemandOf, best: dict[int, Ranked] = best) -> Ranked:
                best[id(held)] = self._rank(held.item, demand)[0]
                return best[id(held)]

            held = next_to_go(self._queue, self._simulation.now, rank)
            if held is None:
                break
            self._queue.served(held)
            self._send(held.item, best[id(held)])
        if self._queue:
            busy = [engine for engine in self.fleet.view().engines if not has_room(engine)]
            self._timer += 1
            later = self._simulation.now + room_in_ms(busy) / 1e3
            self._simulation.at(later, partial(self._pump_at, self._timer))

    def _pump_at(self, timer: int) -> None:
        if timer == self._timer:  # otherwise another was set since
            self.pump()

    def _rank(self, ask: _Ask, demand: DemandOf = lambda engine: engine) -> Sequence[Ranked]:
        predicted = self.fleet.predicted.of(ask.keys)
        candidates = [
            self._simulation.candidate(ask, demand(engine), predicted.get(engine.endpoint))
            for engine in self.fleet.view().engines
        ]
        if self._policy == "cost":
            return policy.by_cost(candidates, self._rng.getrandbits(32))
        if self._policy == "least_loaded":
            return policy.least_loaded(candidates, self._rng)
        return policy.round_robin(candidates, next(self._turns))

    def _send(self, ask: _Ask, chosen: Ranked) -> None:
        sent = Sent(chosen.candidate.work, chosen.terms.own_work, ask.keys)
        ask.flight = self.fleet.flight(chosen.candidate.engine.endpoint, sent)
        ask.flight.__enter__()
        ask.router = self
        self._simulation.sent(ask, chosen.candidate.engine.endpoint)


class Simulation:
    """One row. `run` returns its figures in trace time, under the names of `bench_router.py`."""

    def __init__(
        self, offered: traffic.Offered, policy_name: str, options: Options, *, seed: int = 0
    ) -> None:
        self.now = 0.0
        self._offered = offered
        self._options = options
        self._rng = Random(seed)
        self._model = EngineModel()
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._asks: list[_Ask] = []
        self.engines: dict[str, _Engine] = {}
        for number in range(NUM_ENGINES):
            host = PrefixCache(options.host_blocks) if options.host_blocks else None
            name = f"http://e{number}"
            self.engines[name] = _Engine(
                endpoint=name,
                session=bytes([number]) * 16,
                hbm=PrefixCache(self._model.hbm_blocks),
                host=host,
                rate_factor=self._rng.lognormvariate(0, options.rate_error),
            )
        self._routers = [
            _Router(self, policy_name, holds=options.holds, rng=Random(seed * 1000 + number))
            for number in range(options.replicas)
        ]

    def run(self, warm_up: int) -> dict[str, float]:
        for request, at in zip(self._offered.requests, self._offered.arrivals_s, strict=True):
            self.at(at / self._options.compression, partial(self._arrive, request))
        if self._options.share_s is not None:
            ends = max(self._offered.arrivals_s) / self._options.compression
            for number, router in enumerate(self._routers):
                phase = PUBLISH_S * number / len(self._routers)
                self.at(phase, partial(self._publish, router, ends))
        while self._due:
            self.now, _, event = heapq.heappop(self._due)
            event()
        return self._figures(self._asks[warm_up:])

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), event))

    # ------------------------------------------------------------------ the routers

    def _arrive(self, request: traffic.Request) -> None:
        blocks = request.engine_blocks()
        usable = len(blocks) - (len(blocks) * self._model.block_tokens == request.prompt_tokens)
        ask = _Ask(request, blocks, blocks[:usable], _keys(blocks), self.now)
        self._asks.append(ask)
        self._rng.choice(self._routers).arrive(ask)

    def _publish(self, router: _Router, ends: float) -> None:
        """To the others after `share_s`; what they heard is that old at least."""
        assert self._options.share_s is not None
        report = router.fleet.shared.report(router.fleet.loads())
        for other in self._routers:
            if other is not router:
                self.at(self.now + self._options.share_s, partial(self._hear, other, report))
        if self.now < ends:
            self.at(self.now + PUBLISH_S, partial(self._publish, router, ends))

    def _hear(self, router: _Router, report: LoadReport) -> None:
        router.fleet.shared.hear([report], late_s=self._options.share_s or 0.0)
        router.pump()

    def sent(self, ask: _Ask, endpoint: str) -> None:
        engine = self.engines[endpoint]
        engine.queue.append(ask)
        if len(engine.queue) == 1:
            self._start(engine)

    def candidate(self, ask: _Ask, view: EngineView, predicted: Present | None) -> Candidate:
        engine, usable = self.engines[view.endpoint], ask.usable
        node = NodeId(view.endpoint)
        present = {
            Holder(node, TierName.HBM, engine.session): _present(usable, engine.told[TierName.HBM]),
            Holder(node, TierName.HOST): _present(usable, engine.told[TierName.HOST]),
        }
        reuse = policy.reuse_of(
            view,
            present,
            predicted if predicted is None else predicted[: len(usable)],
            num_blocks=len(usable),
            block_tokens=self._model.block_tokens,
        )
        return Candidate(_mistaken(view, engine.rate_factor), ask.request.prompt_tokens, reuse)

    # ------------------------------------------------------------------ an engine

    def _start(self, engine: _Engine) -> None:
        ask, block_tokens = engine.queue[0], self._model.block_tokens
        hbm = engine.hbm.match(ask.usable)
        host = max(engine.host.match(ask.usable) - hbm, 0) if engine.host else 0
        cached = (hbm + host) * block_tokens
        ask.cached = Work(
            ask.request.prompt_tokens - cached, hbm * block_tokens, host * block_tokens
        )
        work_s = self._model.prefill_s(ask.request.prompt_tokens, cached)
        work_s += host * block_tokens / HOST_TOKENS_PER_S
        self.at(self.now + work_s / self._options.compression, lambda: self._first_token(engine))

    def _first_token(self, engine: _Engine) -> None:
        ask = engine.queue.popleft()
        ask.ttft_s = self.now - ask.arrived_s
        assert ask.flight is not None
        ask.flight.stream_event()
        engine.computed_tokens += ask.cached.computed
        tiers = [(TierName.HBM, engine.hbm)]
        tiers += [(TierName.HOST, engine.host)] if engine.host else []
        for tier, cache in tiers:
            new, removed = cache.keep(ask.blocks)
            gone = {key for key, _ in removed}
            told = engine.told[tier]
            self.at(self.now + NEWS_S, partial(_tell, told, new, gone))
        engine.num_decoding += 1
        tokens = ask.request.output_tokens
        decode_s = self._model.decode_s_of(tokens - 1, engine.num_decoding)
        self.at(self.now + decode_s / self._options.compression, lambda: self._end(engine, ask))
        if engine.queue:
            self._start(engine)
        assert ask.router is not None
        ask.router.pump()  # the others hear nothing of it

    def _end(self, engine: _Engine, ask: _Ask) -> None:
        engine.num_decoding -= 1
        assert ask.flight is not None
        ask.flight.stream_event()
        ask.flight.answered(ask.cached, completion_tokens=ask.request.output_tokens)
        ask.flight.__exit__(None, None, None)

    def _figures(self, asks: Sequence[_Ask]) -> dict[str, float]:
        ttft_ms = [ask.ttft_s * self._options.compression * 1e3 for ask in asks]
        prompts = sum(ask.request.prompt_tokens for ask in asks)
        cached = prompts - sum(ask.cached.computed for ask in asks)
        work = [engine.computed_tokens for engine in self.engines.values()]
        return {
            "ttft_ms_mean": statistics.mean(ttft_ms),
            **{f"ttft_ms_p{p}": harness.percentile(ttft_ms, p) for p in (50, 95, 99)},
            "reused_share": cached / prompts,
            "imbalance": max(work) * len(work) / sum(work),
        }


def _keys(blocks: Sequence[int]) -> list[BlockKey]:
    return [BlockKey(block.to_bytes(32, "little", signed=True)) for block in blocks]


def _present(blocks: Sequence[int], held: set[Hashable]) -> Present:
    return np.array([block in held for block in blocks], np.bool_)


def _tell(told: set[Hashable], new: set[Hashable], gone: set[Hashable]) -> None:
    told |= new
    told -= gone


def _mistaken(view: EngineView, factor: float) -> EngineView:
    rates = view.rates
    wrong = Rates(
        token_ms=rates.token_ms * factor,
        context_ms=rates.context_ms * factor,
        answer_ms=rates.answer_ms * factor,
        host_ms=rates.host_ms * factor,
        ssd_ms=rates.ssd_ms * factor,
    )
    return replace(view, rates=wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description="the router's benchmark in virtual time")
    parser.add_argument("--trace", nargs="*", default=["conversation", "rtp_llm"])
    parser.add_argument("--load", nargs="*", type=float, default=[0.7, 1.0, 1.3])
    parser.add_argument("--policies", nargs="*", default=POLICIES, choices=POLICIES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--host-blocks", type=int, default=0)
    parser.add_argument("--send-at-once", action="store_true")
    parser.add_argument("--rate-error", type=float, default=0.0)
    parser.add_argument("--compression", type=float, default=COMPRESSION)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--share-s", type=float, default=None)
    args = parser.parse_args()
    options = Options(
        holds=not args.send_at_once,
        host_blocks=args.host_blocks,
        rate_error=args.rate_error,
        compression=args.compression,
        replicas=args.replicas,
        share_s=args.share_s,
    )
    for trace, load in itertools.product(args.trace, args.load):
        requests = traffic.load(trace)
        for name in args.policies:
            rows = []
            for seed in range(args.seeds):
                offered = traffic.offer(
                    requests,
                    count=args.requests,
                    seed=seed,
                    seeds=3,
                    tokens_per_s=load * NUM_ENGINES * EngineModel().prefill_tokens_per_s,
                )
                simulation = Simulation(offered, name, options, seed=seed)
                rows.append(simulation.run(args.requests // 4))
            means = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
            told = "  ".join(f"{key} {value:.4g}" for key, value in means.items())
            print(f"{trace:12} {load:g} {name:12} {told}", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
