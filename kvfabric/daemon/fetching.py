"""The side of a transfer that wants the blocks: asks whom a router's hints name, and receives into slots.

`promise` asks the nodes that a handle names whether they may serve more of the prompt than is here, for a
moment only. What one of them holds is reserved here as an engine's own store would be (charged, fenced, one
writer a part), so a second request for the same blocks finds them on their way; then it arrives in the
background, verified before anybody sees it. Every failure is a miss: the engine computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import grpc
import msgspec
import numpy as np

from kvfabric.client.link import wire_layout
from kvfabric.daemon import arriving
from kvfabric.daemon.arriving import Chunk
from kvfabric.daemon.sessions import Session
from kvfabric.errors import (
    CorruptBlock,
    DeadlineExceeded,
    KVFabricError,
    PeerClosed,
    TransferError,
)
from kvfabric.hashing import ROOT_PARENT
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.store.copying import batch_bounds
from kvfabric.store.meter import Meter
from kvfabric.store.store import BlockStore
from kvfabric.tiers.arena import PAGE_BYTES, Slots
from kvfabric.tls import Security, open_channel
from kvfabric.transfer.flow import Buffers, Flow
from kvfabric.transfer.packing import cut, messages_of, parts_per_message
from kvfabric.transfer.ucx import Link, Message, Transport
from kvfabric.types import KEY_BYTES, GrantState, PartSpec, SessionId

log = logging.getLogger(__name__)

ANSWER_S = 0.05
"""A peer that takes longer to say what it holds is not worth waiting for."""
DROP_S = 5.0
"""Nobody waits for it, and a hold that is not dropped has the peer's lease budget until it expires."""
FETCH_S = 5.0
"""Blocks that are not there after this are computed; see also `sending.SEND_S`."""
CHUNK_BYTES = 16 << 20
IN_FLIGHT_BYTES = 256 << 20
BUFFER_BYTES = 128 << 20
VERIFY_THREADS = 2
MAX_REQUESTS = 4096
MAX_CHUNK_BLOCKS = 256


_LIFE = (
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
)


@dataclass(slots=True)
class _Hint:
    handle: str
    sources: tuple[str, ...]
    is_asked: bool = False


@dataclass(slots=True)
class _Peer:
    """A node that holds blocks for us, and the way to it. `num_chunks`: still to come."""

    stub: Any
    meter: Meter
    link: Link
    hold: bytes
    keys: bytes
    session: Session
    num_chunks: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing is to come any more."""


class Fetches:
    """An async context manager: leaving aborts what is on its way.

    `peers`: each other node's gRPC, by its id; `meter`: of what comes from it. `counts`: blocks, bytes and
    failures, by what became of them.
    Over a transport that is sealed nothing comes that is not.
    """

    def __init__(
        self,
        store: BlockStore,
        transport: Transport,
        security: Security,
        *,
        peers: Callable[[], Mapping[str, str]],
        meter: Callable[[str], Meter],
        fetch_s: float = FETCH_S,
    ) -> None:
        self._meter = meter
        self.counts: Counter[str] = Counter()
        self._store = store
        self._transport = transport
        self._security = security
        self._peers = peers
        self._fetch_s = fetch_s
        self._hints: OrderedDict[tuple[SessionId, str], _Hint] = OrderedDict()
        self._channels: dict[str, Any] = {}
        self._links: dict[str, Link] = {}
        self._flow = Flow(IN_FLIGHT_BYTES)
        self._buffers = Buffers(BUFFER_BYTES)
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_paused = False

    async def __aenter__(self) -> Fetches:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.pause()
        await self._group.__aexit__(None, None, None)
        for channel in self._channels.values():
            await channel.close()

    async def pause(self) -> None:
        """End what is on its way and begin nothing, until `resume`: no slot is written any more."""
        self._is_paused = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    def resume(self) -> None:
        self._is_paused = False

    # -- what handles say ----------------------------------------------------------------------------

    def opened(
        self, session: Session, request_id: str, handle: str, sources: tuple[str, ...]
    ) -> None:
        self._hints[session.id, request_id] = _Hint(handle, sources)
        for source in sources:
            if address := self._peers().get(source):
                self._channel(address).get_state(try_to_connect=True)
        if len(self._hints) > MAX_REQUESTS:
            self._hints.popitem(last=False)

    def released(self, session: SessionId, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._hints.pop((session, request_id), None)

    def concerns(self, session: SessionId, request_id: str) -> bool:
        """Whether peers are still to be asked for this request."""
        hint = self._hints.get((session, request_id))
        return hint is not None and not hint.is_asked

    # -- promises ------------------------------------------------------------------------------------

    async def promise(self, session: Session, request_id: str, keys: bytes) -> None:
        """Have what a peer holds beyond our own blocks on its way, so that a match finds it. Never raises
        for what a peer does. Cancelled, what has begun goes on.
        """
        hint = self._hints.get((session.id, request_id))
        if hint is None or hint.is_asked or self._is_paused:
            return
        hint.is_asked = True
        here = self._store.peek(session.id, request_id, keys)
        if here * KEY_BYTES == len(keys):
            return
        for source in hint.sources:
            try:
                peer, count = await self._hold(source, session, hint.handle, keys)
            except (KVFabricError, grpc.aio.AioRpcError) as exc:
                self._refused(source, exc)
                continue
            here = self._store.peek(session.id, request_id, keys)
            if count > here and not self._is_paused:
                await self._begin(peer, request_id, keys, here, count)
                return
            self._start(self._drop(peer))

    def follow(
        self,
        session: Session,
        request_id: str,
        handle: str,
        source: str,
        keys: bytes,
        wait_s: float,
    ) -> asyncio.Task[None]:
        """Have blocks that an engine of `source` is computing come as they are stored there. Done when all
        are here, no more will come, or after `wait_s`; never raises. What is on its way then goes on."""
        return self._start(self._follow(session, request_id, handle, source, keys, wait_s))

    async def _follow(
        self,
        session: Session,
        request_id: str,
        handle: str,
        source: str,
        keys: bytes,
        wait_s: float,
    ) -> None:
        peer: _Peer | None = None
        try:
            async with asyncio.timeout(wait_s):
                stub = self._stub(source)
                here = self._store.peek(session.id, request_id, keys)
                async for held in stub.Follow(self._hold_request(session, handle, keys)):
                    if peer is None:
                        link = await self._link(source, held.address)
                        peer = _Peer(
                            stub, self._meter(source), link, held.hold, keys, session, num_chunks=1
                        )
                    if held.num_blocks > here and not self._is_paused:
                        await self._begin(peer, request_id, keys, here, held.num_blocks)
                        here = held.num_blocks
                if peer is not None:
                    self._start(self._one_less(peer))
                    await peer.done.wait()
                    peer = None
        except TimeoutError:
            self.counts["late"] += 1
        except (KVFabricError, grpc.aio.AioRpcError) as exc:
            self._refused(source, exc)
        finally:
            if peer is not None and not peer.done.is_set():
                self._start(self._one_less(peer))

    def _refused(self, source: str, exc: KVFabricError | grpc.aio.AioRpcError) -> None:
        code, why = None, str(exc)
        if isinstance(exc, grpc.aio.AioRpcError):
            code, why = exc.code(), f"{exc.code().name}: {exc.details()}"
        self.counts["refused"] += 1
        # Busy, late and gone are life; anything else somebody should know of.
        level = logging.DEBUG if code is None or code in _LIFE else logging.WARNING
        log.log(level, "node %s holds nothing for us: %s", source, why)

    async def _hold(
        self, source: str, session: Session, handle: str, keys: bytes
    ) -> tuple[_Peer, int]:
        """Raises KVFabricError, AioRpcError."""
        stub = self._stub(source)
        held: pb.Held = await stub.Hold(self._hold_request(session, handle, keys), timeout=ANSWER_S)
        link = await self._link(source, held.address)
        return _Peer(stub, self._meter(source), link, held.hold, keys, session), held.num_blocks

    async def _link(self, source: str, address: bytes) -> Link:
        """To the node's worker; one it had before, as it may have started anew, is not used any more."""
        link = await self._transport.link_to(address)
        before = self._links.get(source)
        if before is not None and before.number != link.number:
            before.close()
        self._links[source] = link
        return link

    def _stub(self, source: str) -> Any:
        """Raises TransferError."""
        address = self._peers().get(source)
        if not address:
            raise TransferError(f"no node {source} in the registry")
        return pb_grpc.NodeTransferStub(self._channel(address))  # type: ignore[no-untyped-call]

    def _hold_request(self, session: Session, handle: str, keys: bytes) -> pb.HoldRequest:
        return pb.HoldRequest(
            handle=handle,
            layout=msgspec.msgpack.encode(wire_layout(session.layout)),
            keys=keys,
            address=self._transport.address,
        )

    def _channel(self, address: str) -> Any:
        channel = self._channels.get(address)
        if channel is None:
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = self._channels[address] = open_channel(address, self._security, options)
        return channel

    async def _begin(
        self, peer: _Peer, request_id: str, keys: bytes, here: int, count: int
    ) -> None:
        """Reserve blocks `here` to `count` and have them come, each chunk from when it is reserved. All that
        come are expected when this returns."""
        session = peer.session
        peer.num_chunks += 1  # this loop, so that the hold stays until it has ended
        try:
            for part in session.layout.parts:
                step = min(max(1, CHUNK_BYTES // part.num_bytes), MAX_CHUNK_BLOCKS)
                for first in range(here, count, step):
                    chunk, is_refused = self._reserve(
                        session, request_id, keys, part, first, min(first + step, count)
                    )
                    if chunk is not None and self._is_paused:
                        self._store.abort(session.id, chunk.reservation)
                        return
                    if chunk is not None:
                        peer.num_chunks += 1
                        self._start(self._receive(peer, chunk))
                        # Its task takes its first step: it is on its way while the next is reserved.
                        await asyncio.sleep(0)
                    if is_refused:
                        break
        finally:
            self._start(self._one_less(peer))

    def _reserve(
        self, session: Session, request_id: str, keys: bytes, part: PartSpec, first: int, end: int
    ) -> tuple[Chunk | None, bool]:
        """What is to come of blocks `first` to `end`, and whether there is no room for more."""
        parent = keys[(first - 1) * KEY_BYTES : first * KEY_BYTES] if first else ROOT_PARENT
        wanted = keys[first * KEY_BYTES : end * KEY_BYTES]
        reserved = self._store.reserve(
            session.id, request_id, parent, wanted, part.group, part.shard
        )
        is_refused = GrantState.REFUSED in reserved.states
        granted = [at for at, s in enumerate(reserved.states) if s == GrantState.GRANTED]
        if not granted:
            return None, is_refused
        count = len(granted)
        if granted[-1] - granted[0] + 1 != count:
            # Somebody stores some in between: what is there already need not travel.
            self._store.abort(session.id, reserved.reservation)
            return None, is_refused
        at = first + granted[0]
        chunk = Chunk(reserved.reservation, at, count, part.group, part.shard, part.num_bytes)
        return chunk, is_refused

    def _start(self, work: Any) -> asyncio.Task[None]:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- arrival -------------------------------------------------------------------------------------

    async def _receive(self, peer: _Peer, chunk: Chunk) -> None:
        try:
            stored, reason = await self._store.receive(
                peer.session.id,
                chunk.reservation,
                partial(self._fill, peer, chunk),
                deadline_s=self._fetch_s,
            )
        except (KVFabricError, grpc.aio.AioRpcError) as exc:
            kind = "corrupt" if isinstance(exc, CorruptBlock) else "failed"
            self.counts[f"{kind}_blocks"] += chunk.count
            log.warning("%d blocks did not come from a peer: %s", chunk.count, exc)
        else:
            self.counts["fetched_blocks" if stored else "unwanted_blocks"] += chunk.count
            self.counts["fetched_bytes"] += chunk.num_bytes if stored else 0
            if not stored:
                log.debug("%d blocks that came are not kept: %s", chunk.count, reason)
        finally:
            await self._one_less(peer)

    async def _one_less(self, peer: _Peer) -> None:
        peer.num_chunks -= 1
        if not peer.num_chunks:
            peer.done.set()
            await self._drop(peer)

    async def _fill(self, peer: _Peer, chunk: Chunk, slots: Slots) -> bytes:
        """Have the chunk sent into `slots`, and verify it. Raises KVFabricError, AioRpcError. However it
        ends, UCX has let go of the slots."""
        try:
            async with asyncio.timeout(self._fetch_s), self._flow.room(chunk.num_bytes):
                num_bytes = 0
                peer.meter.begin()
                try:
                    checksums = await self._sent(peer, chunk, slots)
                    num_bytes = chunk.num_bytes
                finally:
                    peer.meter.end(num_bytes)
                return checksums
        except TimeoutError as exc:
            raise DeadlineExceeded(f"{chunk.count} blocks, {self._fetch_s:g} s") from exc

    async def _sent(self, peer: _Peer, chunk: Chunk, slots: Slots) -> bytes:
        size, together = chunk.part_bytes, parts_per_message(chunk.part_bytes)
        offsets = (slots.first_pages.astype(np.int64) * PAGE_BYTES).tolist()
        arena = self._store.arena_memory()
        messages = messages_of(arena, offsets, size, together)
        tags = [secrets.randbits(64) for _ in messages]
        request = pb.SendRequest(
            hold=peer.hold,
            group=chunk.group,
            shard=chunk.shard,
            first=chunk.first,
            num_blocks=chunk.count,
            tags=tags,
            parts_per_message=together,
            sealed=self._transport.is_sealed,
        )
        lengths = [sum(map(len, views)) for views in messages]
        scattered = [n for n, views in zip(lengths, messages, strict=True) if len(views) > 1]
        buffer = memoryview(b"")
        try:
            try:
                if scattered:
                    buffer = await self._buffers.take(sum(scattered))
                sent: pb.Sent = await peer.stub.Send(request)
                arriving.check(sent, chunk, len(tags), is_sealed=self._transport.is_sealed)
            except (asyncio.CancelledError, CorruptBlock):
                # It may be on its way, under tags that nobody waits for.
                peer.link.abort()
                raise
            pieces = iter(cut(buffer, scattered))
            targets = [views[0] if len(views) == 1 else next(pieces) for views in messages]
            await self._arrived(peer, [Message(b, t) for b, t in zip(targets, tags, strict=True)])
            if sent.key:
                await self._store.in_pool(
                    arriving.openers(peer.hold, peer.keys, chunk, sent, tags, targets)
                )
            works = []
            for begin, end in pairwise(batch_bounds(len(messages), lengths[0], VERIFY_THREADS)):
                sums = sent.checksums[16 * together * begin : 16 * together * end]
                into = list(zip(targets[begin:end], messages[begin:end], strict=True))
                works.append(partial(arriving.settled, into, size, sums))
            arriving.zero_rests(arena, offsets, size)
            return b"".join(await self._store.in_pool(works))
        finally:
            if buffer:
                self._buffers.give(buffer)

    async def _arrived(self, peer: _Peer, messages: list[Message]) -> None:
        """Raises PeerClosed. Cancelled or late, the link is ended, and with it what still comes."""
        posted = peer.link.receive(messages)
        try:
            errors = [error for error in await posted.outcome() if error]
        except BaseException:
            peer.link.abort()
            await _quiet(posted.outcome)
            raise
        if errors:
            raise PeerClosed(f"{len(errors)} of {len(messages)} messages: {errors[0]}")

    async def _drop(self, peer: _Peer) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await peer.stub.Drop(pb.DropRequest(hold=peer.hold), timeout=DROP_S)


async def _quiet(outcome: Callable[[], Any]) -> None:
    """Until UCX is done, however often we are cancelled meanwhile: memory must not be given back before."""
    while True:
        try:
            await outcome()
        except asyncio.CancelledError:
            continue
        return
