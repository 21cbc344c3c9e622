"""A simulated machine's node daemon: the product's store, registry, events, handlers and transfers.

Clock, network and disk are simulated. What is written anew here is the edge: connections of engines, start
and end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kvfabric.client.link import wire_layout
from kvfabric.daemon.admin_sources import AdminSources, Place, Runs
from kvfabric.daemon.fetching import Fetches
from kvfabric.daemon.handlers import (
    CONCURRENT,
    IN_ORDER,
    Caller,
    Services,
    asks_peers,
    match_with_peers,
)
from kvfabric.daemon.meters import Meters
from kvfabric.daemon.node_services import NodeEvents
from kvfabric.daemon.sending import Sender
from kvfabric.daemon.sessions import Session
from kvfabric.errors import PeerClosed
from kvfabric.events.stream import EventStream
from kvfabric.hashing import layout_fingerprint
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.protocol.messages import Confirm, Hello, Match, Request
from kvfabric.registry.database import Database
from kvfabric.registry.redis.address import parse
from kvfabric.registry.redis.outside import Outside
from kvfabric.registry.redis.registry import Holder, RedisRegistry
from kvfabric.registry.state import PURGED
from kvfabric.store.meter import Meter
from kvfabric.store.store import BlockStore, StoreLimits
from kvfabric.testing.simulation.loop import Process
from kvfabric.testing.simulation.network import Network
from kvfabric.testing.simulation.redis import SimulatedLink
from kvfabric.testing.simulation.rpc import Channel, Server
from kvfabric.testing.simulation.wire import SimulatedTransport
from kvfabric.tiers.arena import PAGE_BYTES
from kvfabric.tiers.pool import IoPool
from kvfabric.tls import Security
from kvfabric.types import BlockLayout, PartSpec, SessionId
from tests.simulation.ledger import WatchedArena

if TYPE_CHECKING:
    from tests.simulation.world import World

BLOCK_TOKENS = 4
MODEL = "model-of-the-simulation"
RESERVATION_S = 1.0
FETCH_S, HOLD_S, SEND_S = 0.6, 1.5, 2.2
_NO_SLOTS = np.empty(0, dtype=np.uint32)
_POLL_S = 0.1


def make_layout(num_parts: int) -> BlockLayout:
    return BlockLayout(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        dtype="float32",
        block_tokens=BLOCK_TOKENS,
        engine_block_tokens=BLOCK_TOKENS,
        parts=tuple(PartSpec(0, shard, PAGE_BYTES) for shard in range(num_parts)),
    )


def join(world: World, process: Process, kind: str, address: str = "") -> RedisRegistry:
    """The fleet's registry as a process sees it; its durable copy is its host's."""
    outside = Outside(
        clock=process.clock,
        wall_clock=process.wall_clock,
        database=lambda home: Database(home, world.files[process.host].open_env),
        link=partial(SimulatedLink, world.network),
        thread=lambda: process.threads,
    )
    name = process.host
    return RedisRegistry(
        parse("unix:///simulated", insecure=False),
        Path("/simulated") / name,
        holder=Holder(kind, name, address),
        lease_s=world.plan.epoch_lease_s,
        outside=outside,
    )


@dataclass(slots=True, eq=False)
class Connection:
    """An engine's, to one life of the daemon. `window`: what its process writes."""

    engine: Process
    session: Session
    window: memoryview
    is_open: bool = True


@dataclass(slots=True, eq=False)
class Life:
    """One life of the daemon."""

    process: Process
    arena: WatchedArena
    registry: RedisRegistry
    store: BlockStore
    events: EventStream
    services: Services
    sender: Sender
    fetches: Fetches
    meters: Meters
    connections: dict[SessionId, Connection] = field(default_factory=dict)
    sessions: dict[SessionId, Session] = field(default_factory=dict)


class SimulatedNode:
    """The machine: it outlives its daemon. `life` is None while there is none that serves."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.process: Process | None = None
        self.life: Life | None = None
        self.num_lives = 0
        self.engines: list[Process] = []
        self._arena: WatchedArena | None = None

    # ------------------------------------------------------------------ life and death

    def start(self) -> None:
        self.num_lives += 1
        self.process = self.world.spawn(f"{self.name}.{self.num_lives}", self.name)
        self.process.start(self._live(self.process))

    def kill(self) -> None:
        if self.process is not None and self.process.is_alive:
            self.world.kill(self.process)
        if self.life is not None:
            self.world.ledger.gave_up(self.life.arena)
        self.life = None

    def _memory(self) -> WatchedArena:
        """The arena of the life before if an engine still maps it, its contents void; else a fresh one."""
        old = self._arena
        if old is not None and any(engine.is_alive for engine in self.engines):
            fd = old.read_only_fd()
            arena = cast(WatchedArena, WatchedArena.adopt(fd))
            os.close(fd)
        else:
            arena = cast(WatchedArena, WatchedArena.create(self.world.plan.num_slots * PAGE_BYTES))
        self._arena = arena
        self.world.resources.callback(arena.close)
        arena.resume(_NO_SLOTS, _NO_SLOTS.astype(np.int64), self.world.rng.getrandbits(20))
        self.world.ledger.own(arena)
        return arena

    async def _live(self, process: Process) -> None:
        world, plan = self.world, self.world.plan
        registry = join(world, process, "node", self.name)
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(registry)
            events = EventStream(boot_id=world.rng.randbytes(16), history_bytes=plan.history_bytes)
            arena = self._memory()
            store = BlockStore(
                limits=StoreLimits(
                    host_bytes=arena.size_bytes,
                    max_blocks=plan.max_blocks,
                    lease_s=plan.lease_s,
                    reservation_s=RESERVATION_S,
                    lease_share=plan.lease_share,
                    scrub_bytes_per_s=plan.scrub_bytes_per_s,
                ),
                registry=registry.usable,
                clock=process.clock,
                events=events,
                ssd=None,
                wall_clock=process.wall_clock,
                pool=IoPool(2, "copy", executor=process.threads),
            )
            await stack.enter_async_context(store)
            store.attach_arena(arena)
            meters = Meters(Meter(process.clock), process.clock)
            services = Services(
                store=store,
                keyring=world.keyring,
                registry=registry.usable,
                events=events,
                require_handle=True,
                wall_clock=process.wall_clock,
                meters=meters,
            )
            transport: Any = SimulatedTransport(world.fabric, process)
            security = Security("node", None, True)
            sender = await stack.enter_async_context(
                Sender(services, transport, hold_s=HOLD_S, send_s=SEND_S)
            )
            fetches = _Fetches(
                store,
                transport,
                security,
                peers=lambda: {
                    one.name: one.address for one in registry.holders if one.kind == "node"
                },
                meter=meters.peer,
                fetch_s=FETCH_S,
            )
            fetches.network = world.network
            services.fetches = await stack.enter_async_context(fetches)
            self.life = Life(
                process, arena, registry, store, events, services, sender, fetches, meters
            )
            self._listen(self.life)
            world.ledger.note(self.name, f"life {self.num_lives} serves")
            await self._withdraw(self.life)

    def _listen(self, life: Life) -> None:
        store = life.store

        async def turn() -> None:
            await asyncio.sleep(0)

        sources = AdminSources(
            registry=life.registry,
            keyring=self.world.keyring,
            events=life.events,
            status=lambda _: pb.NodeStatus(),
            resident=lambda tier: cast(Runs, store.resident_runs(tier, 64)),
            turn=turn,
            rates=life.meters.rates,
            place=Place(exchanges=True),
            models=_NoModels(),  # type: ignore[arg-type]
        )
        server = Server()
        pb_grpc.add_NodeEventsServicer_to_server(NodeEvents(sources, self.name), server)  # type: ignore[no-untyped-call]
        pb_grpc.add_NodeTransferServicer_to_server(life.sender, server)  # type: ignore[no-untyped-call]
        server.serve(self.world.network, self.name, life.process)
        self.world.network.serve(f"{self.name}/engines", life.process, partial(self._asked, life))

    async def _withdraw(self, life: Life) -> None:
        """What was purged leaves the arena, as `daemon.withdrawals` does it; until killed."""
        version, gone = 0, frozenset[bytes]()
        while True:
            state = await life.registry.wait_newer(version)
            version = state.version
            self.world.ledger.state(self.name, state)
            struck = frozenset[bytes](
                one.incarnation for one in state.templates.values() if one.state == PURGED
            )
            if struck - gone:
                life.process.start(self._destroy(life, struck - gone))
                gone = struck

    async def _destroy(self, life: Life, names: frozenset[bytes]) -> None:
        while True:
            if not await life.store.purge_more(names):
                break
            await asyncio.sleep(_POLL_S)
        self.world.ledger.note(self.name, f"destroyed {len(names)} incarnations")

    # ------------------------------------------------------------------ engines

    def connect(
        self, engine: Process, hello: Hello, window: memoryview, resumed: SessionId | None
    ) -> tuple[Life, Connection]:
        """What `daemon.sessions` does when an engine says hello. Raises PeerClosed."""
        life = self.life
        if life is None:
            raise PeerClosed("no daemon")
        layout = self.world.layout
        number = resumed or SessionId(self.world.rng.randbytes(16))
        if number in life.sessions:
            life.store.quiet(number)
        life.store.open_session(number, layout)
        session = Session(number, hello, layout, layout_fingerprint(layout))
        life.sessions[number] = session
        connection = Connection(engine, session, window)
        life.connections[number] = connection
        life.events.engine_joined(
            pb.Engine(
                session=number,
                engine_id=hello.engine_id,
                endpoint=hello.endpoint,
                model=hello.model,
                model_revision=hello.model_revision,
                layout_fingerprint=session.fingerprint,
                block_tokens=layout.block_tokens,
                block_bytes=layout.block_bytes,
            )
        )
        return life, connection

    def disconnected(self, session: SessionId, *, exited: bool) -> None:
        """An engine's connection ended: its rights do; its memory is quiet once its process has exited."""
        life = self.life
        if life is None or session not in life.sessions:
            return
        connection = life.connections.pop(session, None)
        if connection is not None:
            connection.is_open = False
            life.store.end_rights(session)
            life.events.engine_gone(session)
        if exited:
            del life.sessions[session]
            life.store.quiet(session)

    async def _asked(self, life: Life, method: str, payload: Any) -> Any:
        number, message = cast(tuple[SessionId, Request], payload)
        connection = life.connections.get(number)
        if connection is None or not connection.is_open:
            raise PeerClosed("no such session here")
        caller = Caller(life.services, connection.session, connection.window)
        if asks_peers(caller, message):
            reply: Any = await match_with_peers(caller, cast(Match, message))
        elif type(message) in IN_ORDER:
            reply = IN_ORDER[type(message)](caller, message)
        else:
            reply = await CONCURRENT[type(message)](caller, message)
        if isinstance(message, Confirm) and reply.num_blocks:
            request = life.store._leases.find(number, message.request_id)
            assert request is not None
            self.world.ledger.confirmed(self.name, request[1].grant, reply)
        return reply


class _Fetches(Fetches):
    """The product's, over the simulated network."""

    network: Network

    def _channel(self, address: str) -> Any:
        return Channel(self.network, address)


class _NoModels:
    def own(self) -> list[pb.Model]:
        return []


def make_hello(engine_id: str, endpoint: str, layout: BlockLayout) -> Hello:
    return Hello(
        version=1,
        role=0,
        session=b"",
        resumed=False,
        engine_id=engine_id,
        endpoint=endpoint,
        model=MODEL,
        model_revision=MODEL,
        adapter="",
        adapter_revision="",
        layout=wire_layout(layout),
        shard=0,
        window_bytes=0,
    )
