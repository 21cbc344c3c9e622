"""One engine process after its handshake: frames in, answers out, and the window it writes.

What a request means is in `handlers`. A connection that breaks the wire contract gets one `Failed` and is
closed; a request that fails gets `Failed` and its connection lives.

Backpressure: a connection has at most `MAX_RUNNING` requests under way and `MAX_OUTPUT_BYTES` of answers
waiting; beyond that it is not read, so its engine's own socket fills. Connections take turns with each other
and with the store's own work (`kvfabric.store.turns`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import select
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from kvfabric.daemon.adoption import ProcessId
from kvfabric.daemon.handlers import (
    CONCURRENT,
    IN_ORDER,
    Caller,
    asks_peers,
    match_with_peers,
)
from kvfabric.daemon.sessions import Process
from kvfabric.errors import KVFabricError, ProtocolError, RemoteProtocolError
from kvfabric.protocol.codec import FrameReader, decode_request, encode
from kvfabric.protocol.messages import Bye, Done, Failed, Reply, Request

if TYPE_CHECKING:
    from kvfabric.daemon.server import EngineServer

log = logging.getLogger(__name__)

MAX_RUNNING = 64
MAX_OUTPUT_BYTES = 1 << 20


class ConnectionState(msgspec.Struct, frozen=True):
    """A connection, for a successor. `socket`, `window`: positions among the descriptors that go along, -1:
    none. `unfinished`: what was read of a frame that has not come whole yet."""

    session: bytes
    process: ProcessId
    has_arena: bool
    socket: int
    window: int
    window_bytes: int
    unfinished: bytes


class Connection(asyncio.Protocol):
    """One engine process after its handshake. Its window is unmapped when the last copy of it ended.

    `window_descriptor`, -1 for none, is kept for a successor and closed with the connection.
    """

    def __init__(
        self,
        server: EngineServer,
        caller: Caller,
        process: Process,
        *,
        has_arena: bool,
        window_descriptor: int,
        unfinished: bytes = b"",
    ) -> None:
        self.has_arena = has_arena
        self._window_descriptor = window_descriptor
        self._frozen = False
        self._server = server
        self._caller = caller
        self._process = process
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._reader.feed(unfinished)
        self._frames: deque[tuple[int, bytes]] = deque()
        self._running = 0
        self._output_full = False
        self._turn_due = False
        self._said_bye = False
        self._has_left = False

    def __repr__(self) -> str:
        name = self._caller.session.id.hex()[:8]
        return (
            f"<Connection of session {name}: {self._running} running, {len(self._frames)} queued>"
        )

    def close(self) -> None:
        """Send what is waiting and close. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End now, without sending what is waiting. Idempotent."""
        if self._transport is not None:
            self._transport.abort()
        self._leave()

    def freeze(self) -> None:
        """Read no more; what was read is answered."""
        self._frozen = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def thaw(self) -> None:
        self._frozen = False
        self._work()

    def is_at_rest(self) -> bool:
        """Everything that was read is answered, and the answers are with the kernel."""
        if self._transport is None or self._transport.is_closing():
            return False  # it will soon be no connection any more
        return not (self._frames or self._running or self._output_waits())

    def is_unread(self) -> bool:
        """Nothing is to be done but to send answers that the engine does not take."""
        return self._transport is not None and not self._running and self._output_waits()

    def _output_waits(self) -> bool:
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def describe(self, numbered: list[int]) -> ConnectionState:
        """Of one at rest."""
        assert self._transport is not None
        numbered.append(self._transport.get_extra_info("socket").fileno())
        at, window = len(numbered) - 1, -1
        if self._window_descriptor >= 0:
            window = len(numbered)
            numbered.append(self._window_descriptor)
        return ConnectionState(
            session=self._caller.session.id,
            process=self._process.id,
            has_arena=self.has_arena,
            socket=at,
            window=window,
            window_bytes=len(self._caller.window),
            unfinished=self._reader.unfinished,
        )

    def is_of(self, session: bytes) -> bool:
        return self._caller.session.id == session

    def is_hung_up(self) -> bool:
        """Whether the other end is closed, read or not."""
        if self._transport is None:
            return True
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_OUTPUT_BYTES)
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._leave()

    def _leave(self) -> None:
        if self._has_left:
            return
        self._has_left = True
        self._frames.clear()
        if self._window_descriptor >= 0:
            os.close(self._window_descriptor)
            self._window_descriptor = -1
        self._server.ended(self)
        clean = self._said_bye and not self._running
        self._server.sessions.leave(self._caller.session, self._process, said_bye=clean)

    def pause_writing(self) -> None:
        self._output_full = True

    def resume_writing(self) -> None:
        self._output_full = False
        self._work()

    def data_received(self, data: bytes) -> None:
        try:
            self._frames.extend(self._reader.feed(data))
        except RemoteProtocolError as exc:
            self._break(0, exc)
            return
        self._work()

    def eof_received(self) -> None:
        if self._reader.num_pending_bytes:
            self._break(0, RemoteProtocolError("the stream ends in the middle of a frame"))

    def _work(self) -> None:
        """Answer what is queued, as far as backpressure and this turn allow."""
        turns = self._server.services.store.turns
        while self._frames and self._may_work():
            if self._turn_due or not turns.is_open():
                self._work_soon()
                break
            self._answer(*self._frames.popleft())
        if self._transport is None or self._transport.is_closing():
            self._frames.clear()
        elif self._frames or self._frozen:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _work_soon(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._server.services.store.turns.call(self._next_turn)

    def _next_turn(self) -> None:
        self._turn_due = False
        if self._frames and self._may_work():
            self._answer(*self._frames.popleft())
        self._work()

    def _may_work(self) -> bool:
        if self._transport is None or self._transport.is_closing():
            return False
        return self._running < MAX_RUNNING and not self._output_full

    def _answer(self, correlation: int, body: bytes) -> None:
        try:
            request = decode_request(body)
        except RemoteProtocolError as exc:
            self._break(correlation, exc)
            return
        kind = type(request)
        if kind in CONCURRENT:
            self._running += 1
            self._server.spawn(self._finish(correlation, request, CONCURRENT[kind]))
        elif asks_peers(self._caller, request):
            self._running += 1
            self._server.spawn(self._finish(correlation, request, match_with_peers))
        elif kind in IN_ORDER:
            with self._failing(correlation):
                self._reply(correlation, IN_ORDER[kind](self._caller, request))
        elif isinstance(request, Bye):
            self._said_bye = True
            self._reply(correlation, Done())
            self.close()
        else:
            self._break(correlation, RemoteProtocolError("a connection says hello once"))

    async def _finish(
        self,
        correlation: int,
        request: Request,
        handler: Callable[[Caller, Any], Awaitable[Reply]],
    ) -> None:
        try:
            with self._failing(correlation):
                await self._server.services.store.turns.wait()
                self._reply(correlation, await handler(self._caller, request))
        finally:
            self._running -= 1
        if self._frames:
            self._work_soon()

    @contextlib.contextmanager
    def _failing(self, correlation: int) -> Iterator[None]:
        """Top of one request: whatever goes wrong in it becomes its answer."""
        try:
            yield
        except ProtocolError as exc:
            self._break(correlation, exc)
        except KVFabricError as exc:
            self._reply(correlation, Failed(exc.code, str(exc)))
        except Exception as exc:  # one of the two places that may: the daemon lives on
            log.exception("request of session %s failed", self._caller.session.id.hex()[:8])
            self._reply(correlation, Failed(KVFabricError.code, f"internal error: {exc!r}"))

    def _reply(self, correlation: int, reply: Reply) -> None:
        result = reply.code if isinstance(reply, Failed) else "ok"
        self._server.counts.requests[result] += 1
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(correlation, reply))

    def _break(self, correlation: int, error: ProtocolError) -> None:
        """One error frame, then the end of the connection."""
        self._server.counts.protocol_errors += 1
        log.warning("session %s: %s", self._caller.session.id.hex()[:8], error)
        self._reply(correlation, Failed(error.code, str(error)))
        self.close()


def make_window(num_bytes: int) -> tuple[memoryview, int]:
    """(our mapping, descriptor for the engine) of fresh memory that nobody can shrink; (empty, -1) for 0."""
    if num_bytes == 0:
        return memoryview(b""), -1
    descriptor = os.memfd_create("kvfabric-window", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        return map_window(descriptor, num_bytes), descriptor
    except BaseException:
        os.close(descriptor)
        raise


def map_window(descriptor: int, num_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ))
