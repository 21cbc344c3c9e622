"""The side of a transfer that has the blocks: `NodeTransfer`, for other nodes of the fleet.

A hold is a request of the store like an engine's: opened with the handle that the asking node passes on,
fenced, counted and leased as any other. UCX reads the arena itself, so the lease ends on proof only: when the
asker dropped the hold, or it expired, *and* every send of it has completed. A peer that does not take its
bytes in time loses its link, which completes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np

from kvfabric.daemon.grants import Weights, granted, terms_of
from kvfabric.daemon.handlers import Services
from kvfabric.daemon.handoffs import LOOK_EVERY_S, MAX_WAIT_S, MAY_COME
from kvfabric.daemon.rpc import stream, unary
from kvfabric.daemon.sessions import to_layout
from kvfabric.errors import BadHandle, NotFound, Overloaded, RemoteProtocolError
from kvfabric.handle import Handle, open_relayed
from kvfabric.hashing import layout_fingerprint
from kvfabric.protocol import kvfabric_pb2 as pb
from kvfabric.protocol import kvfabric_pb2_grpc as pb_grpc
from kvfabric.protocol.messages import WireLayout
from kvfabric.transfer import sealing
from kvfabric.transfer.flow import Buffers
from kvfabric.transfer.packing import cut, gather, messages_of
from kvfabric.transfer.ucx import Link, Message, Posted, Transport
from kvfabric.types import KEY_BYTES, SessionId, TenantId

MAX_HOLDS = 256
MAX_SENDING_BYTES = 1 << 30
"""Posted and not completed, for all peers; beyond it a peer is refused and computes."""
BUFFER_BYTES = 256 << 20
"""For parts that are not neighbours in the arena and travel together."""
MAX_TEST_BYTES = 16 << 20
HOLD_S = 30.0
SEND_S = 10.0
"""A peer takes what was posted for it within this, or its link is ended."""

_LAYOUTS = msgspec.msgpack.Decoder(WireLayout)


@dataclass(slots=True)
class _Hold:
    session: SessionId
    keys: bytes
    link: Link
    expiry: asyncio.TimerHandle
    posted: list[Posted] = field(default_factory=list)
    num_reading: int = 0
    is_dropped: bool = False

    @property
    def is_quiet(self) -> bool:
        return not self.num_reading and all(posted.quiet for posted in self.posted)


class Sender(pb_grpc.NodeTransferServicer):
    """An async context manager: leaving ends what is being sent and releases all holds.

    `hold_s`: a hold that nobody drops ends by itself; `send_s`: how long a peer may take for what was posted.
    """

    def __init__(
        self,
        services: Services,
        transport: Transport,
        *,
        hold_s: float = HOLD_S,
        send_s: float = SEND_S,
    ) -> None:
        self._hold_s = hold_s
        self._send_s = send_s
        self.counts: Counter[str] = Counter()
        self._services = services
        self._transport = transport
        self._holds: dict[bytes, _Hold] = {}
        self._sending_bytes = 0
        self._buffers = Buffers(BUFFER_BYTES)
        self._is_paused = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.pause()

    async def pause(self) -> None:
        """End what is being sent and every hold; there are no new ones until `resume`."""
        self._is_paused = True
        for hold in [*self._holds.values()]:
            hold.link.abort()
        for number in [*self._holds]:
            self._drop(number)
        await self._idle.wait()

    def resume(self) -> None:
        self._is_paused = False

    @unary
    async def Hold(self, request: pb.HoldRequest, context: Any) -> pb.Held:
        """Raises BadHandle, Fenced, UnknownTenant, Overloaded, RemoteProtocolError."""
        number, _ = await self._open(request)
        held = self._held(number)
        if not held.num_blocks:
            self._drop(number)
        return held

    @stream
    async def Follow(self, request: pb.HoldRequest, context: Any) -> AsyncIterator[pb.Held]:
        """Raises as `Hold`. On cancellation what is not being sent yet will not be."""
        number, opened = await self._open(request)
        handoffs, handoff = self._services.handoffs, opened.handoff
        if handoff is None or not handoff.wait_ms:
            self._drop(number)
            raise BadHandle("the handle of no request that waits for another's blocks")
        name = TenantId(opened.tenant), handoff.name
        began, told, more = time.monotonic(), -1, True
        try:
            while more and (hold := self._holds.get(number)) is not None and not hold.is_dropped:
                more = handoffs.may_come(name, began) and time.monotonic() < began + MAX_WAIT_S
                held = self._held(number, counts=not more)
                if held.num_blocks > told:
                    told = held.num_blocks
                    yield held
                if told * KEY_BYTES == len(request.keys) or held.reason not in MAY_COME:
                    more = False
                elif more:
                    await handoffs.news.wait(LOOK_EVERY_S)
        finally:
            if more:
                self._drop(number)

    def _held(self, number: bytes, *, counts: bool = True) -> pb.Held:
        """What there is now, leased."""
        hold = self._holds[number]
        matched = self._services.store.match(hold.session, _REQUEST, hold.keys, counts=counts)
        return pb.Held(
            hold=number,
            num_blocks=matched.num_blocks,
            reason=matched.reason,
            address=self._transport.address,
        )

    async def _open(self, request: pb.HoldRequest) -> tuple[bytes, Handle]:
        services = self._services
        if (
            self._is_paused
            or len(self._holds) >= MAX_HOLDS
            or self._sending_bytes >= MAX_SENDING_BYTES
        ):
            raise Overloaded("this node sends as much as it may")
        layout = to_layout(_decoded(request.layout))
        fingerprint = layout_fingerprint(layout)
        if not request.keys or len(request.keys) % KEY_BYTES:
            raise RemoteProtocolError(f"keys are {KEY_BYTES} bytes each")
        opened = open_relayed(
            request.handle, services.keyring.handle_keys(), now=services.wall_clock()
        )
        if opened.layout_fingerprint != fingerprint:
            raise BadHandle("handle for another layout")
        weights = Weights(
            opened.model_revision,
            opened.adapter,
            opened.adapter_revision,
            fingerprint,
            layout.block_tokens,
        )
        given = granted(services, terms_of(opened), weights)
        link = await self._transport.link_to(request.address)
        if self._is_paused:
            raise Overloaded("this node is handing over")
        number = secrets.token_bytes(16)
        session = SessionId(number)
        services.store.open_session(session, layout)
        services.store.open_request(session, _REQUEST, given.grant)
        expiry = asyncio.get_running_loop().call_later(self._hold_s, self._drop, number)
        self._holds[number] = _Hold(session, request.keys, link, expiry)
        self._idle.clear()
        return number, opened

    @unary
    async def Send(self, request: pb.SendRequest, context: Any) -> pb.Sent:
        hold = self._holds.get(request.hold)
        if hold is None or hold.is_dropped:
            raise NotFound("no such hold, or no more")
        start, end = request.first * KEY_BYTES, (request.first + request.num_blocks) * KEY_BYTES
        together = max(1, request.parts_per_message)
        if not 0 < end - start <= len(hold.keys) - start or len(request.tags) != -(
            -request.num_blocks // together
        ):
            raise RemoteProtocolError("blocks of the hold are sent, with a tag for each message")
        located = await self._services.store.load(
            hold.session, _REQUEST, hold.keys[start:end], request.group, request.shard
        )
        if located.num_blocks < request.num_blocks or hold.is_dropped:
            return pb.Sent(there=False, reason=located.reason)
        size = located.part_bytes
        views = self._messages(located.offsets, size, together)
        num_bytes = request.num_blocks * size
        key, seals = b"", b""
        if self._transport.is_sealed or request.sealed:
            key = sealing.fresh_key()
            memory, seals, given_back = await self._sealed(request, hold, views, size, key)
        else:
            memory, given_back = await self._in_one_piece(request.hold, hold, views)
        messages = [Message(b, tag) for b, tag in zip(memory, request.tags, strict=True)]
        self._post(request.hold, hold, messages, num_bytes, given_back)
        self.counts["sent_blocks"] += request.num_blocks
        self.counts["sent_bytes"] += num_bytes
        return pb.Sent(
            there=True, part_bytes=size, checksums=located.checksums, key=key, seals=seals
        )

    @unary
    async def Drop(self, request: pb.DropRequest, context: Any) -> pb.Dropped:
        self._drop(request.hold)
        return pb.Dropped()

    @unary
    async def SendTest(self, request: pb.SendTestRequest, context: Any) -> pb.TestSent:
        """Raises Overloaded, RemoteProtocolError."""
        num_bytes = len(request.tags) * request.num_bytes
        if not 0 <= num_bytes <= MAX_TEST_BYTES:
            raise RemoteProtocolError(f"a test is at most {MAX_TEST_BYTES} bytes")
        if self._is_paused or self._sending_bytes >= MAX_SENDING_BYTES:
            raise Overloaded("this node sends as much as it may")
        link = await self._transport.link_to(request.address)
        if num_bytes:
            zeros = memoryview(bytes(request.num_bytes))
            posted = link.send([Message(zeros, tag) for tag in request.tags])
            timer = asyncio.get_running_loop().call_later(SEND_S, link.abort)
            posted.when_quiet(timer.cancel)
        said = await self._transport.describe(link) if request.describe else ""
        return pb.TestSent(address=self._transport.address, link=said)

    # -- in between ----------------------------------------------------------------------------------

    def _messages(self, offsets: bytes, num_bytes: int, together: int) -> list[list[memoryview]]:
        starts = np.frombuffer(offsets, "<u8").tolist()
        return messages_of(self._services.store.arena_memory(), starts, num_bytes, together)

    async def _in_one_piece(
        self, number: bytes, hold: _Hold, messages: list[list[memoryview]]
    ) -> tuple[list[memoryview], Callable[[], None]]:
        """The memory of each message, and what to call when nobody reads it any more."""
        scattered = [views for views in messages if len(views) > 1]
        if not scattered:
            return [view for (view,) in messages], lambda: None
        works = [partial(gather, views) for views in scattered]
        packed, _, given_back = await self._copied(number, hold, scattered, works)
        gathered = iter(packed)
        memory = [views[0] if len(views) == 1 else next(gathered) for views in messages]
        return memory, given_back

    async def _sealed(
        self,
        request: pb.SendRequest,
        hold: _Hold,
        messages: list[list[memoryview]],
        part_bytes: int,
        key: bytes,
    ) -> tuple[list[memoryview], bytes, Callable[[], None]]:
        """The memory of each message, their tags, and what to call when nobody reads it any more."""
        works = []
        step = max(1, request.parts_per_message) * KEY_BYTES
        end = (request.first + request.num_blocks) * KEY_BYTES
        for number, (tag, views) in enumerate(zip(request.tags, messages, strict=True)):
            begin = request.first * KEY_BYTES + number * step
            head = sealing.header(
                hold=request.hold,
                group=request.group,
                shard=request.shard,
                part_bytes=part_bytes,
                tag=tag,
                keys=hold.keys[begin : min(begin + step, end)],
            )
            works.append(partial(sealing.seal, key, number, head, views))
        memory, seals, given_back = await self._copied(request.hold, hold, messages, works)
        return memory, b"".join(seals), given_back

    async def _copied(
        self,
        number: bytes,
        hold: _Hold,
        messages: list[list[memoryview]],
        works: Sequence[Callable[[memoryview], bytes]],
    ) -> tuple[list[memoryview], list[bytes], Callable[[], None]]:
        """Each message written by its work into memory of its own: that, what the works returned, and what
        to call when nobody reads it any more. The hold is not quiet while parts are read; on cancellation
        they are not read any more."""
        sizes = [sum(map(len, views)) for views in messages]
        hold.num_reading += 1
        try:
            buffer = await self._buffers.take(sum(sizes))
            try:
                memory = cut(buffer, sizes)
                told = await self._services.store.in_pool(
                    [partial(work, out) for work, out in zip(works, memory, strict=True)]
                )
            except BaseException:
                self._buffers.give(buffer)
                raise
        finally:
            hold.num_reading -= 1
            self._settle(number)
        return memory, told, partial(self._buffers.give, buffer)

    def _post(
        self,
        number: bytes,
        hold: _Hold,
        messages: list[Message],
        num_bytes: int,
        given_back: Callable[[], None],
    ) -> None:
        posted = hold.link.send(messages)
        hold.posted.append(posted)
        self._sending_bytes += num_bytes
        timer = asyncio.get_running_loop().call_later(self._send_s, self._too_late, hold)

        def ended() -> None:
            timer.cancel()
            given_back()
            self._sending_bytes -= num_bytes
            self._settle(number)

        posted.when_quiet(ended)

    def _too_late(self, hold: _Hold) -> None:
        self.counts["late_peers"] += 1
        hold.link.abort()

    def _drop(self, number: bytes) -> None:
        hold = self._holds.get(number)
        if hold is not None:
            hold.expiry.cancel()
            hold.is_dropped = True
            self._settle(number)

    def _settle(self, number: bytes) -> None:
        """Release what is dropped and quiet."""
        hold = self._holds.get(number)
        if hold is None or not hold.is_dropped or not hold.is_quiet:
            return
        del self._holds[number]
        store = self._services.store
        store.release(hold.session, [_REQUEST])
        store.end_rights(hold.session)
        store.quiet(hold.session)
        if not self._holds:
            self._idle.set()


_REQUEST = "held"


def _decoded(layout: bytes) -> WireLayout:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _LAYOUTS.decode(layout)
    raise RemoteProtocolError("no block layout")
