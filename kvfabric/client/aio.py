"""AsyncNodeClient: the asyncio driver."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvfabric.client.link import (
    BYE_DEADLINE_S,
    Attached,
    Client,
    EngineHello,
    Exchange,
    R,
    again,
    attach,
    discard,
    expect,
    pack_u32,
    pack_u64,
)
from kvfabric.errors import (
    ClosedError,
    ConnectError,
    DeadlineExceeded,
    KVFabricError,
    Overloaded,
    PeerClosed,
    ProtocolError,
    from_wire,
)
from kvfabric.protocol import descriptors
from kvfabric.protocol.codec import MAX_BODY_BYTES, FrameReader, decode_reply, encode
from kvfabric.protocol.messages import (
    Abort,
    Bye,
    Commit,
    Committed,
    Confirm,
    Confirmed,
    Done,
    EngineEvents,
    Failed,
    HandleOpened,
    Load,
    Located,
    Match,
    Matched,
    OpenHandle,
    Ping,
    Pong,
    Recheck,
    Rechecked,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
)
from kvfabric.types import BlockKey

MAX_UNSENT_BYTES = 2 * MAX_BODY_BYTES
"""Of requests that wait for the node to read: a late call's own stays among them."""


@dataclass(slots=True)
class _Calls(asyncio.Protocol):
    """asyncio side of an exchange: who waits for which answer."""

    exchange: Exchange
    waiting: dict[int, asyncio.Future[Reply]] = field(default_factory=dict)
    broken: KVFabricError | None = None
    transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            replies = self.exchange.feed(data)
        except ProtocolError as exc:
            self.fail(exc)
            return
        for correlation, reply in replies:
            waiter = self.waiting.get(correlation)
            if waiter is not None and not waiter.done():
                waiter.set_result(reply)
            elif correlation == 0 and isinstance(reply, Failed):
                self.fail(from_wire(reply.code, reply.message))

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(PeerClosed("the node closed the connection"))

    def fail(self, error: KVFabricError) -> None:
        if self.broken is None:
            self.broken = error
        for waiter in self.waiting.values():
            if not waiter.done():
                waiter.set_exception(again(self.broken))
        if self.transport is not None:
            self.transport.close()


class AsyncNodeClient(Client):
    """asyncio driver: the verbs of NodeClient. Cancelled or late, a call's answer is dropped.

    `async with await AsyncNodeClient.connect(...) as client` closes it.
    """

    def __init__(self, attached: Attached) -> None:
        super().__init__(attached)
        self._calls = _Calls(self._exchange)

    @classmethod
    async def connect(
        cls,
        socket_path: str | Path,
        hello: EngineHello,
        *,
        deadline_s: float,
        session: bytes = b"",
    ) -> AsyncNodeClient:
        """Connect, say hello and map arena and window. On cancellation nothing is left open."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        received: list[int] = []
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.get_running_loop().sock_connect(sock, str(socket_path))
                frame = encode(0, hello.to_wire(session=session, resumed=False))
                descriptors.send(sock, frame, ())
                attached = attach(await _first_reply_async(sock, received), received)
        except TimeoutError as exc:
            discard(sock, received)
            raise DeadlineExceeded(f"no node answered at {socket_path}") from exc
        except OSError as exc:
            discard(sock, received)
            raise ConnectError(f"no node at {socket_path}: {exc.strerror}") from exc
        except BaseException:
            discard(sock, received)
            raise
        client = cls(attached)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: client._calls, sock)
        except BaseException:
            sock.close()
            client._drop_memory()
            raise
        return client

    async def __aenter__(self) -> AsyncNodeClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @property
    def closed(self) -> bool:
        return self._calls.broken is not None

    async def open_handle(self, request_id: str, handle: str, *, deadline_s: float) -> HandleOpened:
        return await self._call(OpenHandle(request_id, handle), HandleOpened, deadline_s)

    async def match(
        self, request_id: str, keys: Sequence[BlockKey], *, deadline_s: float
    ) -> Matched:
        return await self._call(Match(request_id, b"".join(keys)), Matched, deadline_s)

    async def load(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        *,
        group: int,
        shard: int,
        deadline_s: float,
    ) -> Located:
        message = Load(request_id, b"".join(keys), group, shard)
        return await self._call(message, Located, deadline_s)

    async def read(self, located: Located, destinations: Sequence[memoryview]) -> int:
        """NodeClient.read in a thread. Cancelled, it still writes `destinations` until it ends."""
        return await asyncio.to_thread(self._reader.read, located, destinations)

    async def confirm(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        located: Located,
        *,
        group: int,
        shard: int,
        deadline_s: float,
    ) -> Confirmed:
        generations = located.generations[: 4 * len(keys)]
        message = Confirm(request_id, b"".join(keys), generations, group, shard)
        return await self._call(message, Confirmed, deadline_s)

    async def recheck(
        self,
        request_id: str,
        keys: Sequence[BlockKey],
        *,
        group: int,
        shard: int,
        deadline_s: float,
    ) -> Rechecked:
        """Tell the node that these leased parts did not verify; it looks for itself."""
        message = Recheck(request_id, b"".join(keys), group, shard)
        return await self._call(message, Rechecked, deadline_s)

    async def reserve(
        self,
        request_id: str,
        parent: BlockKey,
        keys: Sequence[BlockKey],
        *,
        group: int,
        shard: int,
        deadline_s: float,
    ) -> Reserved:
        message = Reserve(request_id, parent, b"".join(keys), group, shard)
        return await self._call(message, Reserved, deadline_s)

    async def commit(
        self, reservation: int, indexes: Sequence[int], offsets: Sequence[int], *, deadline_s: float
    ) -> Committed:
        message = Commit(reservation, pack_u32(indexes), pack_u64(offsets))
        return await self._call(message, Committed, deadline_s)

    async def abort(self, reservation: int, *, deadline_s: float) -> None:
        await self._call(Abort(reservation), Done, deadline_s)

    async def release(self, request_ids: Sequence[str], *, deadline_s: float) -> None:
        await self._call(Release(tuple(request_ids)), Done, deadline_s)

    async def publish(self, events: EngineEvents, *, deadline_s: float) -> None:
        await self._call(events, Done, deadline_s)

    async def ping(self, *, deadline_s: float, dropped: int = -1, kept: str = "") -> Pong:
        """Is the node there? And what was struck off after version `dropped`: see `messages.Ping`."""
        return await self._call(Ping(dropped, kept), Pong, deadline_s)

    async def close(self) -> None:
        """As NodeClient.close. Idempotent."""
        if not self.closed:
            # Unanswered, the node learns of our end by the exit of this process.
            with contextlib.suppress(KVFabricError):
                await self._call(Bye(), Done, BYE_DEADLINE_S)
        self._calls.fail(ClosedError("this client was closed"))
        self._drop_memory()

    async def _call(self, message: Request, expected: type[R], deadline_s: float) -> R:
        calls = self._calls
        if calls.broken is not None:
            raise again(calls.broken)
        assert calls.transport is not None
        if calls.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise Overloaded("the node does not read what was sent before")
        waiter: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        correlation, frame = self._exchange.start(message)
        calls.waiting[correlation] = waiter
        calls.transport.write(frame)
        try:
            async with asyncio.timeout(deadline_s):
                return expect(await waiter, expected)
        except TimeoutError as exc:
            name = type(message).__name__
            raise DeadlineExceeded(f"{name} was not answered in {deadline_s:g} s") from exc
        finally:
            del calls.waiting[correlation]


async def _first_reply_async(sock: socket.socket, received: list[int]) -> Reply:
    reader = FrameReader()
    while True:
        await descriptors.readable(sock)
        try:
            frames = descriptors.receive(sock, reader, received)
        except BlockingIOError:
            continue
        if frames:
            return decode_reply(frames[0][1])
