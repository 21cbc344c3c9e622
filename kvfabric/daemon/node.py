"""One life of a node: puts store, tiers, registry, events and servers together, and owns the arena.

Start and stop are one stack of contexts, so whatever was started is stopped, in reverse: first the
engines' socket (nothing new is accepted, rights end), then SSD writes are sealed, then the tiers close.
A life may begin with what another process hands over, and end by handing it on (`takeover`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfabric import garbage
from kvfabric.config import NodeConfig
from kvfabric.daemon.admin import AdminServer
from kvfabric.daemon.admin_sources import AdminSources, Place
from kvfabric.daemon.adoption import ArenaKeeper
from kvfabric.daemon.auditor import Auditor, AuditorParts
from kvfabric.daemon.fleet_models import FleetModels
from kvfabric.daemon.front import Front
from kvfabric.daemon.handlers import Services
from kvfabric.daemon.handoffs import Handoffs
from kvfabric.daemon.lookups import Lookups
from kvfabric.daemon.meters import Meters
from kvfabric.daemon.peers import TcpListener
from kvfabric.daemon.pools import Pools
from kvfabric.daemon.prefetching import Prefetches
from kvfabric.daemon.server import EngineServer, Offer, ServerOptions
from kvfabric.daemon.sessions import Session, Sessions
from kvfabric.daemon.stall import StallProbe
from kvfabric.daemon.status import degraded, node_samples, node_status
from kvfabric.daemon.takeover import Estate, TakeoverServer, take_over
from kvfabric.daemon.takeover_wire import HbmEntry, NodeState
from kvfabric.daemon.withdrawals import NodeParts, Withdrawals
from kvfabric.errors import (
    CapacityError,
    ConfigError,
    NoSpace,
    RemoteProtocolError,
    TransferError,
)
from kvfabric.events.stream import SLICE_BLOCKS, EventStream
from kvfabric.keyring import Keyring
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol.messages import BlockRun, EngineEvents
from kvfabric.registry.home import everybody_of, fleet_keys, holders_of, open_registry, security_of
from kvfabric.store.breaker import Breaker
from kvfabric.store.store import BlockStore, StoreLimits
from kvfabric.tiers.arena import Arena
from kvfabric.tiers.record_cipher import RecordCipher
from kvfabric.tiers.segments import SegmentTier
from kvfabric.tiers.write_budget import WriteBudget
from kvfabric.types import ENGINE_ROLES, TierName

if TYPE_CHECKING:
    from kvfabric.daemon.http import HttpServer
    from kvfabric.daemon.transfers import Transfers

log = logging.getLogger(__name__)

_STALL_PROBE_S = 0.05
_LOCK_S = 5.0
"""How long the kernel may take to give up what a killed predecessor had."""
_RATES_S = 0.5
_POLL_S = 0.2
"""Between looks at whether a tier that is not there can be had now."""


class Node:
    """`async with Node(config) as node` serves; leaving stops in order. A node runs once.

    `takeover`: go on where the daemon that runs on this state directory is; it hands over and exits.
    """

    def __init__(self, config: NodeConfig, *, takeover: bool = False) -> None:
        self.config = config
        self.ended = asyncio.Event()
        """Set when there is nothing more to do here: a successor serves, or is to."""
        self._takes_over = takeover
        self._estate: Estate | None = None
        self._handed_over = False
        self._lock = -1
        self._changing = asyncio.Lock()  # for changes in the background; held while frozen
        self.front = Front(
            config, admin=self._make_admin, http=self._make_http, changing=self._changing
        )
        self._is_frozen = False
        self.boot_id = secrets.token_bytes(16)
        self.events = EventStream(boot_id=self.boot_id)
        self.lookups = Lookups()
        self.handoffs = Handoffs(config.name)
        self.pools = Pools(lambda name: self.sessions.find_live(name))
        self.ssd: SegmentTier | None = None
        self.transfers: Transfers | None = None
        self.prefetches: Prefetches | None = None
        # Of what these tiers need to be there at all; once there, SSD has breakers of its own.
        self.host_breaker = Breaker("the host tier", time.monotonic)
        self.ssd_breaker = Breaker("the SSD tier", time.monotonic)
        self._ssd_stack = contextlib.AsyncExitStack()
        self._started = time.monotonic()
        self._stack = contextlib.AsyncExitStack()

    def __repr__(self) -> str:
        return f"<Node {self.config.name} boot {self.boot_id.hex()[:8]}: {self.keeper!r}>"

    async def __aenter__(self) -> Node:
        """Raises TransferError if the daemon to take over from does not let go, ConfigError if this one
        cannot serve where it is to: then that one serves on."""
        if self._takes_over:
            self._estate = await take_over(self.config.takeover_socket_path)
        try:
            await self._enter()
        except (CapacityError, RemoteProtocolError) as exc:
            if self._estate is None or self._estate.is_accepted:
                raise
            log.warning("what was handed over is of no use: %s. Starting from SSD", exc)
            estate, self._estate = self._estate, None
            await estate.give_back(str(exc))
            await self._enter()
        except BaseException:
            if self._estate is not None:
                self._estate.close()  # unless it was accepted, the predecessor goes on by that
            raise
        return self

    async def _enter(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        config, estate = self.config, self._estate
        _make_private(config.state_dir)
        if estate is None:
            patience_s = _LOCK_S if self._takes_over else 0.0
            self._lock = stack.enter_context(locked(config.state_dir / "node.lock", patience_s))
        else:
            self._lock = estate.take(estate.lock)
            stack.callback(os.close, self._lock)
        _make_private(config.keyring_path)
        self.keyring = Keyring.create_or_open(config.keyring_path)
        self.registry = await stack.enter_async_context(open_registry(config))
        self.fleet_keys = fleet_keys(self.registry, config, self.keyring)
        self.models = FleetModels.of(config, self._own_models, everybody_of(self.registry))
        self.keeper = ArenaKeeper(config.state_dir / "arena.json", self.boot_id, config.host_bytes)
        stack.callback(self.keeper.close)
        await stack.enter_async_context(self._ssd_stack)  # left after the store
        self.store = await stack.enter_async_context(self._make_store())
        self.sessions = Sessions(self.store, self)
        self.withdrawals = Withdrawals(
            NodeParts(
                registry=self.registry,
                store=self.store,
                sessions=self.sessions,
                keyring=self.keyring,
                node_id=config.name,
                changing=self._changing,
                file=config.state_dir / "withdrawals",
                models_file=config.state_dir / "models",
                awaits_ssd=lambda: bool(config.ssd_bytes) and self.ssd is None,
                wall_clock=time.time,
            )
        )
        self.engines = self._make_server()
        self.auditor = self.withdrawals.auditor = Auditor(
            AuditorParts(
                registry=self.registry,
                services=self.engines.services,
                is_frozen=lambda: self._is_frozen,
                turn=self.store.turns.wait,
                alarm=self.events.alarm,
            )
        )
        if estate is None:
            await self._open_ssd()
            await self.keeper.refresh()
            if not self.keeper.waiting_for:
                self._make_arena()
        else:
            await self._inherit(estate)
            stack.callback(estate.close)
        self.probe = stack.enter_context(StallProbe(_STALL_PROBE_S))
        stack.push_async_callback(self.store.seal)  # after the engines' socket is closed, below
        await self._start_transfers(stack)
        await self._start_prefetches(stack)
        await stack.enter_async_context(self.engines)
        stack.push_async_callback(self.front.close)
        await (self.front.open() if estate is None else self.front.reopen())
        self.takeovers = await stack.enter_async_context(self._make_takeover_server())
        # Last: an error after it would come out as a group of errors.
        group = await stack.enter_async_context(asyncio.TaskGroup())
        for work in self._background():
            stack.callback(group.create_task(work).cancel)
        stack.enter_context(garbage.own_schedule())

    def _background(self) -> Iterator[Coroutine[Any, Any, None]]:
        yield self._await_arena()
        yield self._await_ssd()
        yield self.front.run()
        yield garbage.collect(self.store.turns.wait)
        yield self.withdrawals.run()
        yield self.auditor.run()
        yield self._tell_rates()
        if self.prefetches is not None:
            yield self.prefetches.follow(self.registry)
        if self.fleet_keys is not None:
            yield self.fleet_keys.run()

    def _make_store(self) -> BlockStore:
        config = self.config
        limits = StoreLimits(
            host_bytes=config.host_bytes,
            ssd_bytes=config.ssd_bytes,
            max_blocks=config.max_blocks,
            lease_s=config.lease_s,
            reservation_s=config.reservation_s,
            ssd_deadline_s=config.ssd_deadline_s,
            strict_partition=config.partition == "strict",
        )
        return BlockStore(
            limits=limits,
            registry=lambda: self.registry.usable(),
            clock=time.monotonic,
            events=self.events,
            ssd=None,
        )

    def _inherited_ssd_lock(self) -> int:
        return -1 if self._estate is None else self._estate.take(self._estate.ssd_lock)

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
        if config.ssd_encryption:
            tier.encrypt_with(RecordCipher(self.keyring.data_key))
        tier.inherit_lock(self._inherited_ssd_lock())
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
        self.meters = Meters(self.store.ssd_meter)
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
        self.store.when_stored(self.handoffs.news.tell)
        services = Services(
            store=self.store,
            keyring=self.keyring,
            registry=lambda: self.registry.usable(),
            events=self.events,
            require_handle=config.require_handle,
            wall_clock=time.time,
            lookups=self.lookups,
            handoffs=self.handoffs,
            heard=self.withdrawals.heard,
            meters=self.meters,
            pools=self.pools,
            key_unknown=(lambda: None) if self.fleet_keys is None else self.fleet_keys.wake,
        )
        return EngineServer(options, services, self.sessions)

    async def _start_transfers(self, stack: contextlib.AsyncExitStack) -> None:
        """Between nodes of a fleet only."""
        config, holders = self.config, holders_of(self.registry)
        if not config.ucx_net_devices:
            return
        if holders is None:
            raise ConfigError("node.ucx_net_devices needs node.directory: blocks move in a fleet")
        is_sealed = config.wire == "aes-gcm"
        if is_sealed and config.listen and not config.tls_dir:
            raise ConfigError(
                "node.wire = aes-gcm needs node.tls_dir: keys would go over plain TCP (--insecure)"
            )
        from kvfabric.daemon.transfers import Transfers
        from kvfabric.transfer.ucx import Settings

        self.transfers = await stack.enter_async_context(
            Transfers(
                Settings(config.ucx_net_devices, is_sealed=is_sealed),
                self.engines.services,
                security_of(config),
                lambda: {
                    holder.name: holder.address
                    for holder in holders()
                    if holder.kind == "node" and holder.name != config.name
                },
            )
        )
        self.engines.services.fetches = self.transfers.fetches
        if self.keeper.arena is not None:
            self.transfers.transport.register(self.keeper.arena.view)

    async def _start_prefetches(self, stack: contextlib.AsyncExitStack) -> None:
        """Where there is anything to bring blocks from."""
        if not self.config.ssd_bytes and self.transfers is None:
            return
        services = self.engines.services
        self.prefetches = services.prefetches = await stack.enter_async_context(
            Prefetches(services, self.sessions, host_bytes=self.config.host_bytes)
        )

    def _make_admin(self, tcp: TcpListener | None) -> AdminServer:
        sources = AdminSources(
            registry=self.registry,
            keyring=self.keyring,
            events=self.events,
            status=lambda sealed_keys: node_status(self, sealed_keys=sealed_keys),
            resident=self._resident,
            turn=self.store.turns.wait,
            models=self.models,
            reports=True,
            fleet_keys=self.fleet_keys,
            scrub=self.store.scrub_all,
            lookups=self.lookups,
            handoffs=self.handoffs,
            sender=None if self.transfers is None else self.transfers.sender,
            measure_links=None if self.transfers is None else self.transfers.measure,
            prefetches=self.prefetches,
            rates=self.meters.rates,
            place=Place(
                _machine_id(),
                self.config.rack,
                self.config.zone,
                exchanges=self.transfers is not None,
                host_bytes=self.config.host_bytes,
                ssd_bytes=self.config.ssd_bytes,
            ),
        )
        return AdminServer(
            self.config.admin_socket_path,
            sources,
            node_id=self.config.name,
            epoch_lease_s=self.config.epoch_lease_s,
            clock=lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
            tcp=tcp,
        )

    async def _tell_rates(self) -> None:
        """What was measured, to routers, while it changes. Until cancelled."""
        while True:
            await asyncio.sleep(_RATES_S)
            if rates := self.meters.news():
                self.events.tell_rates(rates)

    def _own_models(self) -> list[pb.Model]:
        return self.withdrawals.models()

    def _resident(self, tier: TierName) -> Iterator[list[tuple[bytes, bytes, bytes]]]:
        for runs in self.store.resident_runs(tier, SLICE_BLOCKS):
            yield [*runs]

    def _make_http(self, host: str, port: int) -> HttpServer:
        from kvfabric.daemon.http import HttpServer  # a fifth of a node's imports

        return HttpServer(
            host,
            port,
            samples=lambda: node_samples(self),
            not_ready=self.not_ready,
            degraded=self._degraded,
        )

    def _degraded(self) -> str:
        found = [f"{tier}: {why}" for tier, why in degraded(self).items() if why]
        return "; ".join([*found, *([self.auditor.alarm] if self.auditor.alarm else [])])

    async def _await_ssd(self) -> None:
        """Until there is an SSD tier: try again when its breaker allows."""
        if self._estate is not None:
            await self._estate.predecessor_exited()
        while self.config.ssd_bytes and self.ssd is None:
            async with self._changing:
                if self.ssd_breaker.begin():
                    try:
                        await self._open_ssd()
                    except (
                        ConfigError
                    ) as exc:  # at the start that is a reason to stop; not any more
                        self.ssd_breaker.fail(str(exc))
            await asyncio.sleep(_POLL_S)

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
        if self.transfers is not None:
            self.transfers.transport.register(arena.view)
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

    # ------------------------------------------------------------------ takeover

    async def _inherit(self, estate: Estate) -> None:
        """Become what the predecessor was. SSD is not part of it: that is opened when it has exited."""
        state, given = estate.take_state(), estate.descriptors
        arena = self.keeper.take_over(given[state.arena])
        os.close(estate.take(state.arena))
        if arena.size_bytes != self.config.host_bytes:
            log.warning(
                "the arena that was taken over has %d bytes; host_bytes counts from the next start on",
                arena.size_bytes,
            )
        self.store.attach_arena(arena)
        self.store.restore(state.contents)
        self.sessions.restore(state.sessions, given)
        self.engines.restore(state.listener, state.connections, given)
        for entry in state.hbm:
            run = BlockRun(entry.namespace_tag, b"", entry.keys)
            self.events.engine_events(entry.session, EngineEvents((run,), (), cleared=False))
        self.front.check()
        await estate.accept()
        self.processes_changed()
        statistics = self.store.statistics()
        log.info(
            "%d blocks and %d connections were taken over; %d bytes drain",
            statistics.num_blocks[TierName.HOST],
            len(state.connections),
            statistics.draining_bytes,
        )

    def _make_takeover_server(self) -> TakeoverServer:
        listener = None
        if self._estate is not None:
            listener = socket.socket(fileno=self._estate.take(self._estate.takeover_listener))
        return TakeoverServer(self.config.takeover_socket_path, self, listener=listener)

    def why_not(self) -> str:
        return "" if self.keeper.arena is not None else "this node has no host tier to hand over"

    async def freeze(self) -> None:
        await self._changing.acquire()
        self._is_frozen = True
        await self.front.close()
        if self.prefetches is not None:
            await self.prefetches.pause()
        if self.transfers is not None:
            await self.transfers.pause()
        await self.engines.freeze()
        await self.store.freeze()

    async def thaw(self) -> None:
        if self.transfers is not None:
            self.transfers.resume()
        if self.prefetches is not None:
            self.prefetches.resume()
        self.store.thaw()
        self.engines.thaw()
        if self._is_frozen:
            self._is_frozen = False
            self._changing.release()
        if self.front.is_shut:
            self.events.reopen()
            await self.front.reopen()

    def describe(self, numbered: list[int]) -> NodeState:
        sessions = self.sessions.describe(numbered)
        listener, connections = self.engines.describe(numbered)
        hbm = tuple(
            HbmEntry(run.engine, run.namespace_tag, run.keys)
            for batch in self.events.hbm_runs()
            for run in batch.runs
        )
        at = len(numbered)
        numbered += [self.keeper.descriptor, self._lock, self.takeovers.descriptor]
        if self.ssd is not None:
            numbered.append(self.ssd.lock_descriptor)
        return NodeState(
            contents=self.store.contents(),
            sessions=sessions,
            connections=connections,
            hbm=hbm,
            arena=at,
            lock=at + 1,
            ssd_lock=-1 if self.ssd is None else at + 3,
            listener=listener,
            takeover_listener=at + 2,
        )

    def hand_over(self) -> None:
        self._handed_over = True
        self.engines.abandon()
        self.ended.set()

    def end(self) -> None:
        self.ended.set()

    # ------------------------------------------------------------------ SessionObserver

    def session_opened(self, session: Session) -> None:
        self.withdrawals.session_opened(session)
        self.auditor.session_opened(session)
        self.events.engine_joined(describe(session))

    def session_ended(self, session: Session) -> None:
        self.pools.ended(session.id)
        self.events.engine_gone(session.id)
        self.handoffs.session_ended(session.id)

    def processes_changed(self) -> None:
        if not self._handed_over:  # the record is the successor's then
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
        serves=hello.serves if hello.serves in ENGINE_ROLES else "both",
    )


@contextlib.contextmanager
def locked(path: Path, patience_s: float = 0.0) -> Iterator[int]:
    """Only one daemon on a state directory; its descriptor. Raises ConfigError if another has it for longer
    than `patience_s`, for which this blocks."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + patience_s
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise ConfigError(f"another node runs on {path.parent}")
            time.sleep(0.02)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _machine_id() -> bytes:
    """The same for all processes of a machine until it boots again; empty if it cannot be told."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return b""
    return hashlib.blake2b(name, digest_size=8).digest()


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"cannot make state_dir {directory}: {exc.strerror}") from exc
