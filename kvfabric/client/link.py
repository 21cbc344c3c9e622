"""What the blocking and the asyncio driver share. No I/O but the mapping of memory."""

from __future__ import annotations

import itertools
import mmap
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kvfabric.client.parts import PartReader
from kvfabric.client.window import Window
from kvfabric.errors import KVFabricError, RemoteProtocolError, from_wire
from kvfabric.protocol import descriptors
from kvfabric.protocol.codec import FrameReader, decode_reply, encode
from kvfabric.protocol.messages import (
    PROTOCOL_VERSION,
    Commit,
    Failed,
    Hello,
    Reply,
    Request,
    Role,
    Welcome,
    WireLayout,
    WirePart,
)
from kvfabric.types import UNKNOWN_COST, BlockLayout, RecomputeCost

BYE_DEADLINE_S = 1.0
R = TypeVar("R", bound=Reply)


@dataclass(frozen=True, slots=True)
class EngineHello:
    """Who connects. `window_bytes` is asked for; the node may give less, and none to a scheduler."""

    engine_id: str
    endpoint: str
    model: str
    model_revision: str
    adapter: str
    adapter_revision: str
    layout: BlockLayout
    shard: int
    window_bytes: int
    role: Role
    recompute: RecomputeCost = UNKNOWN_COST
    serves: str = "both"

    def to_wire(self, *, session: bytes, resumed: bool) -> Hello:
        return Hello(
            version=PROTOCOL_VERSION,
            role=int(self.role),
            session=session,
            resumed=resumed,
            engine_id=self.engine_id,
            endpoint=self.endpoint,
            model=self.model,
            model_revision=self.model_revision,
            adapter=self.adapter,
            adapter_revision=self.adapter_revision,
            layout=wire_layout(self.layout),
            shard=self.shard,
            window_bytes=self.window_bytes,
            us_per_token=self.recompute.us_per_token,
            growth=self.recompute.growth,
            serves=self.serves,
        )


def wire_layout(layout: BlockLayout) -> WireLayout:
    return WireLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        block_tokens=layout.block_tokens,
        engine_block_tokens=layout.engine_block_tokens,
        parts=tuple(WirePart(p.group, p.shard, p.num_bytes) for p in layout.parts),
        kv_scales=layout.kv_scales,
        packing=layout.packing,
        parallel=layout.parallel,
        rope=layout.rope,
        attention=layout.attention,
    )


class Exchange:
    """Correlation ids, and the window regions that unanswered commits hold. Sans-IO, thread-safe."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._reader = FrameReader()
        self._next = itertools.count(1)
        self._holds: dict[int, tuple[int, ...]] = {}

    def start(self, message: Request) -> tuple[int, bytes]:
        """(correlation id, frame) of a request that will now be sent."""
        correlation = next(self._next)
        frame = encode(correlation, message)
        if isinstance(message, Commit):
            offsets = np.frombuffer(message.offsets, dtype="<u8").tolist()
            self._holds[correlation] = self._window.hold(offsets)
        return correlation, frame

    def never_sent(self, correlation: int) -> None:
        self._unhold(correlation)

    def feed(self, data: bytes) -> list[tuple[int, Reply]]:
        """Replies that are whole now. What they answer holds nothing any more, however late."""
        replies = []
        for correlation, body in self._reader.feed(data):
            reply = decode_reply(body)
            self._unhold(correlation)
            replies.append((correlation, reply))
        return replies

    def _unhold(self, correlation: int) -> None:
        starts = self._holds.pop(correlation, None)
        if starts:
            self._window.unhold(starts)


@dataclass(slots=True)
class Attached:
    """What a finished handshake left us with."""

    welcome: Welcome
    arena: memoryview
    arena_descriptor: int  # -1: none
    window: Window


def _map(descriptor: int, num_bytes: int, *, writable: bool) -> memoryview:
    if os.fstat(descriptor).st_size < num_bytes:
        raise RemoteProtocolError(f"a descriptor of {num_bytes} B is shorter than that")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    mapping = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, protection)
    mapping.madvise(mmap.MADV_DONTFORK)  # a child that writes the window would be nobody's session
    mapping.madvise(mmap.MADV_DONTDUMP)  # a core file of an engine holds no other engine's prompts
    return memoryview(mapping)


def attach(reply: Reply, received: list[int]) -> Attached:
    """Map what came with Welcome; takes the descriptors over. Raises what a Failed says."""
    if isinstance(reply, Failed):
        raise from_wire(reply.code, reply.message)
    if not isinstance(reply, Welcome) or reply.version != PROTOCOL_VERSION:
        raise RemoteProtocolError(f"expected Welcome of version {PROTOCOL_VERSION}, got {reply!r}")
    if len(received) != bool(reply.arena_bytes) + bool(reply.window_bytes):
        raise RemoteProtocolError(f"{len(received)} descriptors came with Welcome")
    arena, arena_descriptor, window = memoryview(b""), -1, Window(memoryview(b""))
    if reply.window_bytes:
        window = Window(_map(received[-1], reply.window_bytes, writable=True))
        os.close(received.pop())
    if reply.arena_bytes:
        arena = _map(received[0], reply.arena_bytes, writable=False)
        arena_descriptor = received.pop()
    return Attached(reply, arena, arena_descriptor, window)


def expect(reply: Reply, expected: type[R]) -> R:
    if isinstance(reply, expected):
        return reply
    if isinstance(reply, Failed):
        raise from_wire(reply.code, reply.message)
    raise RemoteProtocolError(f"expected {expected.__name__}, got {type(reply).__name__}")


def pack_u32(values: Sequence[int]) -> bytes:
    return np.asarray(values, dtype="<u4").tobytes()


def pack_u64(values: Sequence[int]) -> bytes:
    return np.asarray(values, dtype="<u8").tobytes()


class Client:
    """What both drivers are made of: the mapped memory, its reader and who we are to the node."""

    def __init__(self, attached: Attached) -> None:
        welcome = attached.welcome
        self.session = welcome.session
        self.boot_id = welcome.boot_id
        self.node_id = welcome.node_id
        self.lease_s = welcome.lease_s
        self.reservation_s = welcome.reservation_s
        self.arena_adopted = welcome.arena_adopted
        self.arena = attached.arena
        self.window = attached.window
        self._arena_descriptor = attached.arena_descriptor
        self._reader = PartReader(attached.arena)
        self._exchange = Exchange(attached.window)

    def _drop_memory(self) -> None:
        """Unmap the arena, as far as the caller kept no view of it."""
        self._reader.close()
        self.arena = memoryview(b"")
        self._reader = PartReader(self.arena)
        if self._arena_descriptor >= 0:
            os.close(self._arena_descriptor)
            self._arena_descriptor = -1


def again(error: KVFabricError | None) -> KVFabricError:
    """A fresh exception like `error`: one object raised in several threads would share a traceback."""
    assert error is not None
    return type(error)(*error.args)


def discard(sock: socket.socket, received: list[int]) -> None:
    sock.close()
    descriptors.close_all(received)
