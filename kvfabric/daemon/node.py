"""One life of a node: puts store, tiers, registry, events and servers together, and owns the arena.

Start and stop are one stack of contexts, so whatever was started is stopped, in reverse: first the
engines' socket (nothing new is accepted, rights end), then SSD writes are sealed, then the tiers close.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from kvfabric.config import NodeConfig, split_address
from kvfabric.daemon import garbage
from kvfabric.daemon.admin import AdminServer, AdminSources
from kvfabric.daemon.adoption import ArenaKeeper
from kvfabric.daemon.handlers import Services
from kvfabric.daemon.server import EngineServer, Offer, ServerOptions
from kvfabric.daemon.sessions import Session, Sessions
from kvfabric.daemon.stall import StallProbe
from kvfabric.daemon.status import degraded, node_samples, node_status
from kvfabric.errors import ConfigError, NoSpace, TransferError
from kvfabric.events.stream import SLICE_BLOCKS, EventStream
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.registry.home import open_registry
from kvfabric.registry.state import PURGED
from kvfabric.store.breaker import Breaker
from kvfabric.store.store import BlockStore, StoreLimits
from kvfabric.tiers.arena import Arena
from kvfabric.tiers.segments import SegmentTier
from kvfabric.tiers.write_budget import WriteBudget
from kvfabric.types import TierName

log = logging.getLogger(__name__)

_STALL_PROBE_S = 0.05
_POLL_S = 0.2
"""Between looks at whether a tier that is not there can be had now."""


class Node:
    """`async with Node(config) as node` serves; leaving stops in order. A node runs once."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.boot_id = secrets.token_bytes(16)
        self.http_address = ""
        self.events = EventStream(boot_id=self.boot_id)
        self.ssd: SegmentTier | None = None
        # Of what these tiers need to be there at all; once there, SSD has breakers of its own.
        self.host_breaker = Breaker("the host tier", time.monotonic)
        self.ssd_breaker = Breaker("the SSD tier", time.monotonic)
        self._ssd_stack = contextlib.AsyncExitStack()
        self._started = time.monotonic()
        self._stack = contextlib.AsyncExitStack()

    def __repr__(self) -> str:
        return f"<Node {self.config.name} boot {self.boot_id.hex()[:8]}: {self.keeper!r}>"

    async def __aenter__(self) -> Node:
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        config = self.config
        _make_private(config.state_dir)
        stack.enter_context(locked(config.state_dir / "node.lock"))
        _make_private(config.keyring_path)
        self.keyring = Keyring.create_or_open(config.keyring_path)
        self.registry = await stack.enter_async_context(open_registry(config))
        self.keeper = ArenaKeeper(config.state_dir / "arena.json", self.boot_id, config.host_bytes)
        stack.callback(self.keeper.close)
        await stack.enter_async_context(self._ssd_stack)  # left after the store
        self.store = await stack.enter_async_context(self._make_store())
        await self._open_ssd()
        self.sessions = Sessions(self.store, self)
        self.engines = self._make_server()
        self.probe = StallProbe(_STALL_PROBE_S)
        self.probe.start()
        stack.callback(self.probe.stop)
        await self.keeper.refresh()
        if not self.keeper.waiting_for:
            self._make_arena()
        stack.push_async_callback(self.store.seal)  # after the engines' socket is closed, below
        await stack.enter_async_context(self.engines)
        await stack.enter_async_context(self._make_admin())
        await self._open_http(stack)
        # Last: an error after it would come out as a group of errors.
        group = await stack.enter_async_context(asyncio.TaskGroup())
        background = (
            self._await_arena(),
            self._await_ssd(),
            garbage.collect(self.store.turns.wait),
            self._purge_struck_off(),
        )
        for work in background:
            stack.callback(group.create_task(work).cancel)
        stack.enter_context(garbage.own_schedule())

    def _make_store(self) -> BlockStore:
        config = self.config
        limits = StoreLimits(
            host_bytes=config.host_bytes,
            ssd_bytes=config.ssd_bytes,
            max_blocks=config.max_blocks,
            lease_s=config.lease_s,
            reservation_s=config.reservation_s,
            ssd_deadline_s=config.ssd_deadline_s,
        )
        return BlockStore(
            limits=limits,
            registry=lambda: self.registry.usable(),
            clock=time.monotonic,
            events=self.events,
            ssd=None,
        )

    async def _open_ssd(self) -> None:
        """Have the SSD tier, or open its breaker: a disk that is full or broken is no reason to be down."""
        config = self.config
        if not config.ssd_bytes:
            return
        tier = SegmentTier(
            config.ssd_path,
            capacity_bytes=config.ssd_bytes,
            clock=time.monotonic,
            budget=WriteBudget(config.ssd_write_bytes_per_day),
        )
        try:
            await self._ssd_stack.enter_async_context(tier)
        except (NoSpace, TransferError) as exc:
            self.ssd_breaker.fail(str(exc))
            return
        await self.store.attach_ssd(tier)
        self.ssd = tier
        self.ssd_breaker.succeed()

    def _make_server(self) -> EngineServer:
        config = self.config
        options = ServerOptions(
            path=config.socket_path,
            node_id=config.name,
            boot_id=self.boot_id,
            window_bytes=config.window_bytes,
            lease_s=config.lease_s,
            reservation_s=config.reservation_s,
            offer=self._offer,
            take_back=self._take_back,
        )
        services = Services(
            store=self.store,
            keyring=self.keyring,
            registry=lambda: self.registry.usable(),
            events=self.events,
            require_handle=config.require_handle,
            wall_clock=time.time,
        )
        return EngineServer(options, services, self.sessions)

    def _make_admin(self) -> AdminServer:
        sources = AdminSources(
            registry=self.registry,
            keyring=self.keyring,
            events=self.events,
            status=lambda sealed_keys: node_status(self, sealed_keys=sealed_keys),
            resident=self._resident,
            turn=self.store.turns.wait,
            purge=self.store.purge,
        )
        return AdminServer(
            self.config.admin_socket_path,
            sources,
            node_id=self.config.name,
            epoch_lease_s=self.config.epoch_lease_s,
            clock=lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        )

    def _resident(self, tier: TierName) -> Iterator[list[tuple[bytes, bytes, bytes]]]:
        for runs in self.store.resident_runs(tier, SLICE_BLOCKS):
            yield [*runs]

    async def _open_http(self, stack: contextlib.AsyncExitStack) -> None:
        if not self.config.http:
            return
        from kvfabric.daemon.http import HttpServer  # a fifth of a node's imports

        host, port = split_address(self.config.http, "node.http")
        server = HttpServer(
            host,
            port,
            samples=lambda: node_samples(self),
            not_ready=self.not_ready,
            degraded=self._degraded,
        )
        await stack.enter_async_context(server)
        self.http_address = server.address

    def _degraded(self) -> str:
        return "; ".join(f"{tier}: {why}" for tier, why in degraded(self).items() if why)

    async def _await_ssd(self) -> None:
        """Until there is an SSD tier: try again when its breaker allows."""
        while self.config.ssd_bytes and self.ssd is None:
            await asyncio.sleep(_POLL_S)
            if self.ssd_breaker.begin():
                await self._open_ssd()

    # ------------------------------------------------------------------ the arena

    def not_ready(self) -> str:
        """Why the node should get no traffic yet; empty when it is ready.

        Waiting for an earlier daemon's arena counts for `sessions_return_s`; then the node is ready
        without a host tier.
        """
        waited = time.monotonic() - self._started
        if (
            self.keeper.waiting_for
            and self.keeper.arena is None
            and waited < self.config.sessions_return_s
        ):
            return f"adopting: {len(self.keeper.waiting_for)} processes have the arena"
        return ""

    def _offer(self) -> Offer:
        arena = self.keeper.arena
        if arena is None:
            return Offer(-1, 0, arena_adopted=False)
        return Offer(self.keeper.descriptor, arena.size_bytes, arena_adopted=self.keeper.adopted)

    def _take_back(self, descriptor: int) -> None:
        """A hello brought an arena: adopt it if it is the one that is missing."""
        try:
            arena = self.keeper.adopt(descriptor)
            if arena is not None:
                log.info("adopted the earlier arena of %d bytes, contents void", arena.size_bytes)
                self._attach(arena)
        finally:
            os.close(descriptor)

    def _make_arena(self) -> None:
        """Have a fresh arena, or open the breaker: refused memory is no reason to be down."""
        try:
            arena = self.keeper.create()
        except (NoSpace, OSError) as exc:
            self.host_breaker.fail(str(exc))
            return
        self.host_breaker.succeed()
        self._attach(arena)

    def _attach(self, arena: Arena) -> None:
        self.store.attach_arena(arena)
        self.engines.drop_without_arena()

    async def _await_arena(self) -> None:
        """Until there is an arena: make one as soon as nobody has the earlier one any more."""
        warned = False
        while self.keeper.is_missing():
            await asyncio.sleep(_POLL_S)
            await self.keeper.refresh()
            if self.keeper.is_missing() and not self.keeper.waiting_for:
                if self.host_breaker.begin():
                    self._make_arena()
            elif self.keeper.is_missing() and not warned and not self.not_ready():
                warned = True
                pids = sorted(process.pid for process in self.keeper.waiting_for)
                log.warning("no host tier: processes %s keep the earlier arena", pids)

    # ------------------------------------------------------------------ the registry

    async def _purge_struck_off(self) -> None:
        """Drop what was purged from here or by another node. Its reach ended before that."""
        struck: frozenset[bytes] = frozenset()
        state = self.registry.state
        while True:
            templates = state.templates.values()
            now = frozenset(bytes(t.incarnation) for t in templates if t.state == PURGED)
            if now - struck:
                await self.store.purge(now - struck)
            struck = now
            state = await self.registry.wait_newer(state.version)

    # ------------------------------------------------------------------ SessionObserver

    def session_opened(self, session: Session) -> None:
        self.events.engine_joined(describe(session))

    def session_ended(self, session: Session) -> None:
        self.events.engine_gone(session.id)

    def processes_changed(self) -> None:
        self.keeper.save(self.sessions.processes())


def describe(session: Session) -> pb.Engine:
    hello, layout = session.hello, session.layout
    return pb.Engine(
        session=session.id,
        engine_id=hello.engine_id,
        endpoint=hello.endpoint,
        model=hello.model,
        model_revision=hello.model_revision,
        adapter=hello.adapter,
        adapter_revision=hello.adapter_revision,
        layout_fingerprint=session.fingerprint,
        block_tokens=layout.block_tokens,
        block_bytes=layout.block_bytes,
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one daemon on a state directory. Raises ConfigError if another has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as exc:
        raise ConfigError(f"another node runs on {path.parent}") from exc
    finally:
        os.close(descriptor)


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"cannot make state_dir {directory}: {exc.strerror}") from exc
