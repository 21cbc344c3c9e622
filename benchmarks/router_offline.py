"""The benchmark of the router in virtual time: production policy and accounting, no processes, seconds a row.

    python benchmarks/router_offline.py [--trace conversation] [--load 1.0] [--policies cost round_robin ...]

Engines, requests and figures are those of `bench_router.py`; fleet, flights, learned rates, expected blocks,
ranking and the queue of those that wait are the router's own, on the virtual clock. Left out: HTTP, tokens
and keys (a block is its number), the node (an engine's news takes `NEWS_S`). For tuning and for what-ifs;
what is quoted comes from `bench_router.py`.

`--rate-error X` multiplies each engine's learned rates by a factor of its own, log-normal with that sigma.
`--host-blocks N` puts a host tier of N blocks behind each engine, loaded at `HOST_TOKENS_PER_S`.
`--send-at-once` lets no request wait at the router.
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


@dataclass(slots=True)
class _Ask:
    request: traffic.Request
    blocks: Sequence[int]
    usable: Sequence[int]
    keys: Sequence[BlockKey]
    arrived_s: float
    flight: Flight | None = None
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


class Simulation:
    """One row. `run` returns its figures in trace time, under the names of `bench_router.py`."""

    def __init__(
        self,
        offered: traffic.Offered,
        policy_name: str,
        *,
        holds: bool = True,
        seed: int = 0,
        host_blocks: int = 0,
        rate_error: float = 0.0,
    ) -> None:
        self.now = 0.0
        self._offered = offered
        self._policy = policy_name
        self._turns = itertools.count()
        self._holds = holds and policy_name == "cost"
        self._queue = HoldQueue[_Ask]()
        self._timer = 0
        self._rng = Random(seed)
        self._model = EngineModel()
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._fleet = Fleet(clock=lambda: self.now)
        self._asks: list[_Ask] = []
        self._engines: dict[str, _Engine] = {}
        for number in range(NUM_ENGINES):
            host = PrefixCache(host_blocks) if host_blocks else None
            name = f"http://e{number}"
            self._engines[name] = _Engine(
                endpoint=name,
                session=bytes([number]) * 16,
                hbm=PrefixCache(self._model.hbm_blocks),
                host=host,
                rate_factor=self._rng.lognormvariate(0, rate_error),
            )
            report = SessionReport(name, name, bytes([number]) * 16, "m", _MODEL, 4096)
            self._fleet.announce(NodeId(name), [report])
            self._fleet.probe_answered(name, ProbeReport("m", tokenizer="byte"))

    def run(self, warm_up: int) -> dict[str, float]:
        for request, at in zip(self._offered.requests, self._offered.arrivals_s, strict=True):
            self._at(at / COMPRESSION, partial(self._arrive, request))
        while self._due:
            self.now, _, event = heapq.heappop(self._due)
            event()
        return self._figures(self._asks[warm_up:])

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), event))

    # ------------------------------------------------------------------ the router

    def _arrive(self, request: traffic.Request) -> None:
        blocks = request.engine_blocks()
        usable = len(blocks) - (len(blocks) * self._model.block_tokens == request.prompt_tokens)
        ask = _Ask(request, blocks, blocks[:usable], _keys(blocks), self.now)
        self._asks.append(ask)
        if not self._holds:
            self._send(ask, self._rank(ask)[0])
            return
        best = self._rank(ask, newcomers_view(self._queue))[0]
        if not self._queue and has_room(best.candidate.engine):
            self._send(ask, best)
            return
        held = Held(tenant="", since=self.now, item=ask)
        self._queue.add(held)
        engine, work = best.candidate.engine, best.candidate.work
        self._queue.turn_to(
            held, engine.endpoint, tokens=work.computed, service_ms=best.terms.own_work
        )
        self._pump()

    def _pump(self) -> None:
        """As `Admission`, with no time between one that goes and the next."""
        while self._queue and any(map(has_room, self._fleet.view().engines)):
            best: dict[int, Ranked] = {}

            def rank(held: Held[_Ask], demand: DemandOf, best: dict[int, Ranked] = best) -> Ranked:
                best[id(held)] = self._rank(held.item, demand)[0]
                return best[id(held)]

            held = next_to_go(self._queue, self.now, rank)
            if held is None:
                break
            self._queue.served(held)
            self._send(held.item, best[id(held)])
        if self._queue:
            busy = [engine for engine in self._fleet.view().engines if not has_room(engine)]
            self._timer += 1
            self._at(self.now + room_in_ms(busy) / 1e3, partial(self._pump_at, self._timer))

    def _pump_at(self, timer: int) -> None:
        if timer == self._timer:  # otherwise another was set since
            self._pump()

    def _rank(self, ask: _Ask, demand: DemandOf = lambda engine: engine) -> Sequence[Ranked]:
        predicted = self._fleet.predicted.of(ask.keys)
        candidates = [
            self._candidate(ask, demand(engine), predicted.get(engine.endpoint))
            for engine in self._fleet.view().engines
        ]
        if self._policy == "cost":
            return policy.by_cost(candidates, self._rng.getrandbits(32))
        if self._policy == "least_loaded":
            return policy.least_loaded(candidates, self._rng)
        return policy.round_robin(candidates, next(self._turns))

    def _send(self, ask: _Ask, chosen: Ranked) -> None:
        sent = Sent(chosen.candidate.work, chosen.terms.own_work, ask.keys)
        ask.flight = self._fleet.flight(chosen.candidate.engine.endpoint, sent)
        ask.flight.__enter__()
        engine = self._engines[chosen.candidate.engine.endpoint]
        engine.queue.append(ask)
        if len(engine.queue) == 1:
            self._start(engine)

    def _candidate(self, ask: _Ask, view: EngineView, predicted: Present | None) -> Candidate:
        engine, usable = self._engines[view.endpoint], ask.usable
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
        self._at(self.now + work_s / COMPRESSION, lambda: self._first_token(engine))

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
            self._at(self.now + NEWS_S, partial(_tell, told, new, gone))
        engine.num_decoding += 1
        tokens = ask.request.output_tokens
        decode_s = self._model.decode_s_of(tokens - 1, engine.num_decoding)
        self._at(self.now + decode_s / COMPRESSION, lambda: self._end(engine, ask))
        if engine.queue:
            self._start(engine)
        self._pump()

    def _end(self, engine: _Engine, ask: _Ask) -> None:
        engine.num_decoding -= 1
        assert ask.flight is not None
        ask.flight.stream_event()
        ask.flight.answered(ask.cached, completion_tokens=ask.request.output_tokens)
        ask.flight.__exit__(None, None, None)

    def _figures(self, asks: Sequence[_Ask]) -> dict[str, float]:
        ttft_ms = [ask.ttft_s * COMPRESSION * 1e3 for ask in asks]
        prompts = sum(ask.request.prompt_tokens for ask in asks)
        cached = prompts - sum(ask.cached.computed for ask in asks)
        work = [engine.computed_tokens for engine in self._engines.values()]
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
    args = parser.parse_args()
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
                simulation = Simulation(
                    offered,
                    name,
                    holds=not args.send_at_once,
                    seed=seed,
                    host_blocks=args.host_blocks,
                    rate_error=args.rate_error,
                )
                rows.append(simulation.run(args.requests // 4))
            means = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
            told = "  ".join(f"{key} {value:.4g}" for key, value in means.items())
            print(f"{trace:12} {load:g} {name:12} {told}", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
