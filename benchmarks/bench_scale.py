"""A fleet of 10, 100 and 1,000 nodes, simulated: what its events, hints and registry cost.

    python benchmarks/bench_scale.py [--quick]

Each node has 100,000 blocks, 80,000 in its host tier and 20,000 in the HBM of its engine. Real are the
store's decisions (`store.replay`: index, queues, eviction), the event stream with its batches and bytes, the
router's node links, index, account and policy, and the registry of every holder; simulated are clock,
network, Redis, and the engines' time. Requests are those of the conversation trace: each eight nodes serve a
copy of it with ids of its own, at `RATE` requests a second a node; what fills the nodes before is asked for
by nobody.

A router serves a pool of at most 128 nodes, and pools share nothing but the registry. So 1,000 nodes are 8
pools of 125, of which one is run (100 million blocks would not fit a machine); the registry has all holders.
Processor time is that of the router's own callbacks, by thread clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import harness
import numpy as np
import numpy.typing as npt
import traffic
from kvfabric_router import policy
from kvfabric_router.fleet import Fleet, ProbeReport
from kvfabric_router.flight import Sent
from kvfabric_router.identity import ModelIdentity
from kvfabric_router.metrics import RouterMetrics
from kvfabric_router.nodes import NodeLink
from kvfabric_router.rates import Work

from kvfabric.daemon.admin_sources import AdminSources
from kvfabric.daemon.node_services import NodeEvents
from kvfabric.events.index import FleetIndex, Holder
from kvfabric.events.stream import EventStream
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.protocol.messages import BlockRun, EngineEvents
from kvfabric.registry.database import Database
from kvfabric.registry.redis.address import parse
from kvfabric.registry.redis.outside import Outside
from kvfabric.registry.redis.registry import Holder as RegistryHolder
from kvfabric.registry.redis.registry import RedisRegistry
from kvfabric.store.replay import Replay
from kvfabric.store.runs import host_runs
from kvfabric.testing.simulation.disk import SimulatedFiles
from kvfabric.testing.simulation.loop import Process, SimulatedLoop, deterministic, run
from kvfabric.testing.simulation.network import Network
from kvfabric.testing.simulation.redis import SimulatedLink, SimulatedRedis
from kvfabric.testing.simulation.rpc import Channel, Server
from kvfabric.tls import Security
from kvfabric.types import DEFAULT_TENANT, BlockKey, TierName

POOL_NODES = 128
NODES_A_COPY = 8
RATE = 0.7
"""Requests a second a node: about what an engine of 12,000 tokens a second carries of this trace."""
TOKENS_A_MS = 20.0
BLOCK_TOKENS = 512
PREFIX_BYTES = 8
TAG = DEFAULT_TENANT.encode()[:8].ljust(8)
FILL_BLOCKS = 2048
LEASE_S = 2.0
_MODEL = ModelIdentity("model", bytes(32), BLOCK_TOKENS)
_SECURITY = Security("router", None, True)

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Sizes:
    host_blocks: int
    hbm_blocks: int
    warm_s: float
    measured_s: float


FULL = Sizes(80_000, 20_000, 10.0, 10.0)
QUICK = Sizes(4_000, 1_000, 4.0, 4.0)


def words_of(numbers: npt.NDArray[np.uint64]) -> Words:
    """(n, 4) key words of blocks by number: splitmix64, so equal numbers are equal keys."""
    columns = []
    for column in range(4):
        mixed = numbers * np.uint64(4) + np.uint64(column)
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        columns.append(mixed)
    return np.stack(columns, axis=1)


class CountedNetwork(Network):
    """Counts what streams carry, by who sends it."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random) -> None:
        super().__init__(loop, rng)
        self.stream_bytes: dict[str, int] = {}
        self.stream_messages: dict[str, int] = {}

    async def stream(self, address: str, method: str, payload: Any) -> AsyncIterator[Any]:
        name = method.rpartition("/")[2]
        async for item in super().stream(address, method, payload):
            self.stream_bytes[name] = self.stream_bytes.get(name, 0) + len(item)
            self.stream_messages[name] = self.stream_messages.get(name, 0) + 1
            yield item

    def forget(self) -> None:
        self.stream_bytes.clear()
        self.stream_messages.clear()


class _Link(NodeLink):
    network: Network

    @contextlib.asynccontextmanager
    async def _channel(self) -> AsyncIterator[Any]:
        yield Channel(self.network, self.target)


class _NoModels:
    def own(self) -> list[pb.Model]:
        return []


class Node:
    """A node with one engine: who stays, who goes, what is told of it; no bytes."""

    def __init__(self, pool: Pool, number: int) -> None:
        self.name = f"n{number}"
        self.session = f"session {number}".encode().ljust(16, b"\0")
        self.endpoint = f"http://e{number}"
        self.process = Process(pool.loop, self.name, self.name, pool.rng)
        self.events = EventStream(boot_id=pool.rng.randbytes(16))
        self.store = pool.stack.enter_context(
            Replay(
                capacity_blocks=pool.sizes.host_blocks,
                block_tokens=BLOCK_TOKENS,
                max_blocks=pool.sizes.host_blocks * 5 // 4,
                events=self.events,
            )
        )
        self.queue = 0.0
        self.num_told = 0
        self._pool = pool
        self._hbm: OrderedDict[int, None] = OrderedDict()

    async def begin(self) -> None:
        """Serve events, then fill both tiers with what others left."""
        sources = AdminSources(
            registry=cast(Any, None),
            keyring=cast(Any, None),
            events=self.events,
            status=lambda _: pb.NodeStatus(),
            resident=lambda tier: (
                cast(Any, host_runs(self.store.residency.index, 8192))
                if tier is TierName.HOST
                else iter(())
            ),
            turn=partial(asyncio.sleep, 0),
            models=cast(Any, _NoModels()),
        )
        server = Server()
        pb_grpc.add_NodeEventsServicer_to_server(NodeEvents(sources, self.name), server)  # type: ignore[no-untyped-call]
        server.serve(self._pool.network, self.name, self.process)
        self.events.engine_joined(
            pb.Engine(
                session=self.session,
                engine_id=self.endpoint,
                endpoint=self.endpoint,
                model=_MODEL.model_revision,
                model_revision=_MODEL.model_revision,
                layout_fingerprint=_MODEL.layout_fingerprint,
                block_tokens=BLOCK_TOKENS,
                block_bytes=BLOCK_TOKENS * 144 * 1024,
            )
        )
        sizes = self._pool.sizes
        for first in range(0, sizes.host_blocks, FILL_BLOCKS):
            self._keep(self._pool.fresh(FILL_BLOCKS), in_hbm=first < sizes.hbm_blocks)

    def answer(self, words: Words) -> tuple[int, int]:
        """(leading blocks in HBM, then in host memory); then it has all of them in both."""
        keys = words[:, 0].tolist()
        hbm = 0
        while hbm < len(keys) and keys[hbm] in self._hbm:
            hbm += 1
        host = max(self._keep(words, in_hbm=True) - hbm, 0)
        return hbm, host

    def _keep(self, words: Words, *, in_hbm: bool) -> int:
        found = self.store.request(words)
        if in_hbm:
            keys = words[:, 0].tolist()
            fresh = [key for key in keys if key not in self._hbm]
            self._hbm.update(dict.fromkeys(fresh))
            for key in keys:
                self._hbm.move_to_end(key)
            over = max(0, len(self._hbm) - self._pool.sizes.hbm_blocks)
            gone = [self._hbm.popitem(last=False)[0] for _ in range(over)]
            self.events.engine_events(
                self.session, EngineEvents(stored=_runs(fresh), removed=_runs(gone), cleared=False)
            )
        return found


def _runs(keys: Sequence[int]) -> tuple[BlockRun, ...]:
    if not keys:
        return ()
    return (BlockRun(TAG, bytes(PREFIX_BYTES), np.array(keys, "<u8").tobytes()),)


class Pool:
    """One router with its nodes."""

    def __init__(
        self, loop: SimulatedLoop, rng: random.Random, num_nodes: int, sizes: Sizes
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.sizes = sizes
        self.network = CountedNetwork(loop, rng)
        self.stack = contextlib.ExitStack()
        self.router = Process(loop, "router", "router", rng)
        self.decisions = Process(loop, "decisions", "router", rng)
        self.fleet = Fleet(clock=self.router.clock)
        self.index = FleetIndex(capacity=1 << 16)
        self.nodes = [Node(self, number) for number in range(num_nodes)]
        self.by_endpoint = {node.endpoint: node for node in self.nodes}
        self.links: list[NodeLink] = []
        self.num_requests = self.num_told = self.num_stale = self.num_missed = 0
        self.num_blocks = self.num_reused = 0
        self._fresh = 1 << 60

    def fresh(self, count: int) -> Words:
        """Keys that nobody had or will ask for."""
        first, self._fresh = self._fresh, self._fresh + count
        return words_of(np.arange(first, first + count, dtype=np.uint64))

    async def connect(self) -> None:
        metrics = RouterMetrics()
        for node in self.nodes:
            link = _Link(
                node.name,
                fleet=self.fleet,
                index=self.index,
                registry=None,
                metrics=metrics,
                security=_SECURITY,
            )
            link.network = self.network
            self.links.append(link)
            self.router.start(link.run())
        async with asyncio.timeout(600):
            while True:
                if all(link.is_settled for link in self.links):
                    break
                await asyncio.sleep(0.1)
        for endpoint in self.fleet.due():
            session = self.by_endpoint[endpoint].session
            self.fleet.probe_answered(endpoint, ProbeReport(_MODEL.model_revision, session, _MODEL))

    async def ask(self, words: Words) -> None:
        """One request, from the choice to the engine's lookup and what it keeps."""
        num_tokens = len(words) * BLOCK_TOKENS + 1
        keys = [BlockKey(raw) for raw in words.astype("<u8").view("V32").ravel().tolist()]
        chosen, present = self._choose(keys, num_tokens)
        engine, reuse = chosen.candidate.engine, chosen.candidate.reuse
        node = self.by_endpoint[engine.endpoint]
        told = {
            tier: present.get(Holder(node.name, tier, session))
            for tier, session in ((TierName.HBM, node.session), (TierName.HOST, b""))
        }
        work = chosen.candidate.work
        with self.fleet.flight(engine.endpoint, Sent(work, chosen.terms.own_work, keys)) as flight:
            now = self.loop.time()
            begins = max(now + 0.001, node.queue)
            took_s = work.computed / TOKENS_A_MS / 1e3
            node.queue = begins + took_s
            await asyncio.sleep(begins - now)
            hbm, host = node.answer(words)
            await asyncio.sleep(took_s)
            flight.stream_event()
            found = Work(
                num_tokens - (hbm + host) * BLOCK_TOKENS,
                hbm=hbm * BLOCK_TOKENS,
                host=host * BLOCK_TOKENS,
            )
            flight.answered(found, completion_tokens=1)
        self.num_requests += 1
        self.num_blocks += len(keys)
        self.num_reused += hbm + host
        claimed = 0
        for blocks in told.values():
            claimed = max(claimed, 0 if blocks is None else _leading(blocks))
        self.num_told += claimed
        self.num_stale += max(0, claimed - hbm - host)
        self.num_missed += max(0, hbm + host - max(claimed, reuse.tokens // BLOCK_TOKENS))

    def _choose(self, keys: list[BlockKey], num_tokens: int) -> tuple[policy.Ranked, Any]:
        present = self.index.match(TAG, keys)
        predicted = self.fleet.predicted.of(keys)
        candidates = [
            policy.Candidate(
                engine,
                num_tokens,
                policy.reuse_of(
                    engine,
                    present,
                    predicted.get(engine.endpoint),
                    num_blocks=len(keys),
                    block_tokens=BLOCK_TOKENS,
                ),
            )
            for engine in self.fleet.view().engines
        ]
        return policy.choose("cost", candidates, self.rng.getrandbits(32))[0], present

    def forget(self) -> None:
        """Measure from here on."""
        self.network.forget()
        self.router.cpu_s = self.decisions.cpu_s = 0.0
        self.num_requests = self.num_told = self.num_stale = self.num_missed = 0
        self.num_blocks = self.num_reused = 0


def _leading(present: npt.NDArray[np.bool_]) -> int:
    return int(present.argmin()) if not present.all() else len(present)


async def _offer(pool: Pool, trace: list[traffic.Request], seconds: float, at: float) -> None:
    """Requests of every copy of the trace, in Poisson order at `RATE`; `at`: where each copy has got to."""
    copies = max(1, len(pool.nodes) // NODES_A_COPY)
    rate = RATE * len(pool.nodes)
    first = int(at * rate / copies)
    running = []
    ends = pool.loop.time() + seconds
    number = 0
    while pool.loop.time() < ends:
        copy, place = number % copies, first + number // copies
        ids = np.array(trace[(place + copy * 997) % len(trace)].ids, np.uint64)
        number += 1
        if len(ids):
            words = words_of(ids + np.uint64((copy + 1) << 32))
            running.append(pool.decisions.start(pool.ask(words)))
        await asyncio.sleep(pool.rng.expovariate(rate))
    await asyncio.wait(running)


def measure_pool(num_nodes: int, sizes: Sizes, seed: int) -> dict[str, float]:
    """One router and its nodes: events, bytes, processor time, memory, stale hints."""
    trace = traffic.load("conversation")
    with deterministic(seed) as rng:
        loop = SimulatedLoop()
        pool = Pool(loop, rng, num_nodes, sizes)

        async def main() -> dict[str, float]:
            began = time.perf_counter()
            for node in pool.nodes:
                await node.process.start(node.begin())
                await asyncio.sleep(0.05)
            pool.router.is_timed = pool.decisions.is_timed = True
            await pool.router.start(pool.connect())
            snapshot_cpu_s = pool.router.cpu_s
            snapshot_bytes = pool.network.stream_bytes.get("Snapshot", 0)
            known = pool.index.statistics()
            filled_s = time.perf_counter() - began
            await _offer(pool, trace, sizes.warm_s, 0.0)
            pool.forget()
            before = [node.events.sequence for node in pool.nodes]
            evicted = sum(node.store.residency.evictions for node in pool.nodes)
            from_s = loop.time()
            await _offer(pool, trace, sizes.measured_s, sizes.warm_s)
            await asyncio.sleep(0.5)
            took = loop.time() - from_s
            batches = sum(n.events.sequence for n in pool.nodes) - sum(before)
            evicted = sum(node.store.residency.evictions for node in pool.nodes) - evicted
            watched = pool.network.stream_bytes.get("Watch", 0)
            statistics = pool.index.statistics()
            return {
                "nodes": num_nodes,
                "blocks_a_node": sizes.host_blocks + sizes.hbm_blocks,
                "index_blocks": statistics.num_blocks,
                "index_bytes_per_block": statistics.num_bytes / statistics.num_blocks,
                "left_out": statistics.num_left_out,
                "snapshot_bytes_per_block": snapshot_bytes / max(1, known.num_blocks),
                "snapshot_cpu_us_per_block": 1e6 * snapshot_cpu_s / max(1, known.num_blocks),
                "requests_per_s": pool.num_requests / took,
                "batches_per_s_per_node": batches / took / num_nodes,
                "bytes_per_s_per_node": watched / took / num_nodes,
                "bytes_per_s_per_router": watched / took,
                "evictions_per_s_per_node": evicted / took / num_nodes,
                "events_cpu_share": pool.router.cpu_s / took,
                "events_cpu_us_per_request": 1e6 * pool.router.cpu_s / pool.num_requests,
                "decision_cpu_us": 1e6 * pool.decisions.cpu_s / pool.num_requests,
                "reused_share": pool.num_reused / pool.num_blocks,
                "stale_share": pool.num_stale / max(1, pool.num_told),
                "fill_s": filled_s,
            }

        try:
            return run(loop, main)
        finally:
            pool.stack.close()


def measure_registry(num_nodes: int, num_routers: int, seed: int) -> dict[str, float]:
    """Commands a second that all holders together ask of the directory's Redis while nothing changes."""
    with deterministic(seed) as rng:
        loop = SimulatedLoop()

        async def main() -> dict[str, float]:
            network = Network(loop, rng)
            redis = SimulatedRedis(network)
            redis.start(Process(loop, "redis", "redis", rng))
            files = SimulatedFiles()
            kinds = ["node"] * num_nodes + ["router"] * num_routers

            async def hold(process: Process, kind: str) -> None:
                outside = Outside(
                    clock=process.clock,
                    wall_clock=process.wall_clock,
                    database=lambda home: Database(home, files.open_env),
                    link=partial(SimulatedLink, network),
                    thread=lambda: process.threads,
                )
                registry = RedisRegistry(
                    parse("unix:///simulated", insecure=False),
                    Path(process.name),
                    holder=RegistryHolder(kind, process.name, process.name),
                    lease_s=LEASE_S,
                    outside=outside,
                )
                async with registry:
                    await asyncio.Event().wait()

            for number, kind in enumerate(kinds):
                process = Process(loop, f"{kind}{number}", f"{kind}{number}", rng)
                process.start(hold(process, kind))
                await asyncio.sleep(LEASE_S / len(kinds))
            await asyncio.sleep(6 * LEASE_S)
            before, since = redis.num_commands, loop.time()
            await asyncio.sleep(2 * LEASE_S)
            return {
                "holders": len(kinds),
                "commands_per_s": (redis.num_commands - before) / (loop.time() - since),
            }

        return run(loop, main)


def pools_of(num_nodes: int) -> int:
    return -(-num_nodes // POOL_NODES)


def main() -> None:
    logging.disable(logging.CRITICAL)  # a thousand holders that wait for a registry say so
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--nodes", type=int, nargs="*", help="fleets of so many nodes")
    args = harness.parse_arguments(__doc__ or "", [parser])
    fleets = args.nodes or ([4, 16, 256] if args.quick else [10, 100, 1000])
    sizes = QUICK if args.quick else FULL
    rows, figures = [], {}
    for num_nodes in fleets:
        pools = pools_of(num_nodes)
        in_pool = num_nodes // pools
        registry = measure_registry(num_nodes, pools, args.seed)
        pool = measure_pool(min(in_pool, 16) if args.quick else in_pool, sizes, args.seed)
        per_request = registry["commands_per_s"] / (RATE * num_nodes)
        row = {"fleet": num_nodes, "routers": pools, **registry, **pool, "per_request": per_request}
        rows.append(row)
        print(json.dumps(row), flush=True)
        at = f"_at_{num_nodes}"
        for name in (
            "bytes_per_s_per_node",
            "bytes_per_s_per_router",
            "events_cpu_us_per_request",
            "decision_cpu_us",
            "index_bytes_per_block",
            "snapshot_cpu_us_per_block",
            "stale_share",
        ):
            figures[name + at] = pool[name]
        figures["registry_commands_per_request" + at] = per_request
    harness.report("scale", args, figures, rows)


if __name__ == "__main__":
    main()
